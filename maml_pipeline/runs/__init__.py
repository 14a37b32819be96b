"""A run on disk: its folder and every file name in it, its settings, its lock, and its results."""
