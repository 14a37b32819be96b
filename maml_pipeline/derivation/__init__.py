"""Derive both orders' meta-gradients on one task: as numbers, text, JSON and a computation graph."""
