"""Export of converted models to other runtimes: ONNX, and packages that run without Python."""

from tilewright.deploy.onnx_export import OnnxFile, export_onnx

__all__ = ["OnnxFile", "export_onnx"]
