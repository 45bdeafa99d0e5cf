"""COCO and Pascal VOC metrics, and measures of how steadily a detector matches."""
