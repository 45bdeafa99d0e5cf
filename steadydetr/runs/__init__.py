"""The folder of a run: its training config, what it writes and how it is read back."""
