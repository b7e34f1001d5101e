"""Float convolution with bias, residual and activation fused."""
