"""How quantised weights are stored: a file for each format, pure functions on tensors and a ``WeightFormat``; no device
code.
"""
