"""Triton kernels, and the functions that launch those of a layer."""
