"""Comparing runs: the comparison, its plots, the report, and the W&B dashboard."""
