"""The engine on a CUDA device: Triton kernels, graphs of decode steps, tables of edits."""
