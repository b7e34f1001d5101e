"""What several Triton kernels share. Imports Triton, so nothing imports this room where there is none."""
