"""Networks of convolutional blocks with a linear head, as programs of compiled kernels."""
