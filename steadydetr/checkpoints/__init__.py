"""Detectors on disk: our folders, and checkpoints of other projects."""
