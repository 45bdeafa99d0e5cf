"""What is measured of a detector: COCO and VOC metrics, the stability of its matching, sampling points and feature masks."""
