"""Parts of our own for SteadyDETR. Importing the package enters them into its table."""

from mylab import boxes_csv, entropy, losses_csv, mosaic, patches, plain_detr, recipes, sharp

__all__ = ["boxes_csv", "entropy", "losses_csv", "mosaic", "patches", "plain_detr", "recipes", "sharp"]
