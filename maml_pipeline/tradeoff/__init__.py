"""The trade-off: a grid of runs over gradient orders, inner steps and seeds."""
