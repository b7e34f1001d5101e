"""What several Triton kernels share, and nothing else uses: all but ``spans`` imports Triton. For any device there is
``kernels.matrices``.
"""
