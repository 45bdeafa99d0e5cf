"""The run folder, read and written here alone, how a run is trained, and where its numbers go."""
