"""Triton kernels, and what launches those of a layer."""
