"""Triton kernels for the steps of `rfclip.reference`."""
