"""The derivation: both orders' meta-gradients on one task, as formulas, text and a graph."""
