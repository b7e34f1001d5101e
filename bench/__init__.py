"""Benchmarks, the table of compiled kernels, and the problems they and the tests are made of."""
