"""Triton kernels for CUDA devices; they also run in Triton's interpreter, which the tests use."""
