"""Tilewright beside ONNX Runtime, OpenVINO, llama.cpp and torch.compile, each in a process of its own: see __main__."""
