"""The frozen configs of detectors, one file a family. They are read without the detectors, and without torch."""
