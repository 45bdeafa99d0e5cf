"""The parts that detectors are built of."""
