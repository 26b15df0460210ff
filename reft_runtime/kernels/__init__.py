"""Arithmetic by device: all kernels of the project."""
