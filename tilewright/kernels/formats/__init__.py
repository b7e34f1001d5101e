"""How quantised weights are stored: pure functions on tensors, no device code."""
