"""Kernels written in C for the CPU, compiled when the package is installed; every one has a fallback in PyTorch."""
