"""What sample inputs tell: rows that reach a layer, scales of tensors, scales of input channels."""
