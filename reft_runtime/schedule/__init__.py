"""Which tokens are computed next, and what may be reused. Knows no tensors."""
