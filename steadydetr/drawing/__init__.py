"""Figures, the report and pictures."""
