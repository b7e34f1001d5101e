"""Which launch configuration a kernel uses."""
