"""int8 convolution with bias, residual, activation and requantisation fused; per-tensor quantisation."""
