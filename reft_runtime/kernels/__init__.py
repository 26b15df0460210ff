"""Arithmetic by device: the one door to kernels."""
