"""A run on disk: its folder and file names, lock, settings and results; finding and reading runs."""
