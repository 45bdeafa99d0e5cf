"""What is done with detectors and recipes besides training: use, evaluation, comparison and cost."""
