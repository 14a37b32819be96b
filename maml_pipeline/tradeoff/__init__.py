"""The trade-off: a grid of runs over orders, inner steps and seeds."""
