"""Kernels for CUDA devices, compiled ahead of time for sm_121, sm_120, sm_90 and sm_89 (``csrc/cuda``)."""
