"""Export of converted models to other runtimes: ONNX, and packages that run without Python."""

from tilewright.deploy.onnx.export import OnnxFile, export_onnx
from tilewright.deploy.package.export import Package, export_package

__all__ = ["OnnxFile", "Package", "export_onnx", "export_package"]
