"""OpenVINO: the float model, NNCF's int8 and int4 weights, compiled for one shape with the latency hint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openvino
import torch
from openvino import properties

from bench.missing import Missing
from bench.peers import networks, openvino_decoder
from bench.peers.contestants import Prepared

GROUP = 128


def _model(name: str, shape: tuple[int, ...]) -> Any:
    """The float model for one shape."""
    given = networks.inputs(name, shape)
    model = openvino.convert_model(networks.plain(name, networks.network(name)), example_input=given)
    model.reshape({value: list(one.shape) for value, one in zip(model.inputs, given, strict=True)})
    return model


def _compiled(model: Any, threads: int, precision: Any) -> Any:
    settings = {
        properties.hint.performance_mode(): properties.hint.PerformanceMode.LATENCY,
        properties.inference_num_threads(): threads,
        properties.hint.inference_precision(): precision,
    }
    return openvino.Core().compile_model(model, "CPU", settings)


def _prepared(model: Any, name: str, shape: tuple[int, ...], threads: int, precision: Any) -> Prepared:
    request = _compiled(model, threads, precision).create_infer_request()
    # Views of the memory of the tensors: nothing is copied on the way in.
    for place, value in enumerate(given := networks.inputs(name, shape)):
        request.set_input_tensor(place, openvino.Tensor(value.numpy(), shared_memory=True))

    def call() -> torch.Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data)

    call.given = given  # type: ignore[attr-defined]  # keeps the inputs alive
    return Prepared(call)


def fp32(name: str, shape: tuple[int, ...], decode: bool, folder: Path, threads: int) -> Prepared:
    """float32 throughout: by default a processor with bfloat16 computes in that."""
    return _prepared(_model(name, shape), name, shape, threads, openvino.Type.f32)


def _quantised(name: str, shape: tuple[int, ...], folder: Path) -> Any:
    """By NNCF after training, with the same data as the others; written once for both precisions."""
    import nncf

    path = folder / f"{name} {'x'.join(map(str, shape))}.int8.xml"
    if path.exists():
        return openvino.Core().read_model(path)
    kind = nncf.ModelType.TRANSFORMER if name in networks.ENCODERS else None
    data = networks.calibration(name)
    model = nncf.quantize(
        _dynamic(name),
        nncf.Dataset(data, lambda batch: [value.numpy() for value in batch]),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=kind,
        subset_size=len(data),
    )
    model.reshape(
        {value: list(one.shape) for value, one in zip(model.inputs, networks.inputs(name, shape), strict=True)}
    )
    openvino.save_model(model, path, compress_to_fp16=False)
    return model


def _dynamic(name: str) -> Any:
    """The float model for every shape, as calibration needs it."""
    given = networks.calibration(name)[0]
    return openvino.convert_model(networks.plain(name, networks.network(name)), example_input=given)


def int8(name: str, shape: tuple[int, ...], decode: bool, folder: Path, threads: int) -> Prepared:
    """int8 products, float32 between them."""
    return _prepared(_quantised(name, shape, folder), name, shape, threads, openvino.Type.f32)


def int8_bf16(name: str, shape: tuple[int, ...], decode: bool, folder: Path, threads: int) -> Prepared:
    """int8 products, bfloat16 between them: what OpenVINO does by itself where the processor has it."""
    _ask_for_bfloat16("int8")
    return _prepared(_quantised(name, shape, folder), name, shape, threads, openvino.Type.bf16)


def int4(name: str, shape: tuple[int, ...], decode: bool, folder: Path, threads: int) -> Prepared:
    """int4 weights in groups of 128, symmetric, by ``compress_weights``, in all layers. With float32 asked for OpenVINO
    rounds activations to int8 in groups of 32 (``findings/openvino_float32_is_the_least_exact.sh``).
    """
    if name == networks.DECODER:
        return openvino_decoder.int4(name, shape, decode, folder, threads)
    return _prepared(_compressed(name, shape), name, shape, threads, openvino.Type.f32)


def int4_bf16(name: str, shape: tuple[int, ...], decode: bool, folder: Path, threads: int) -> Prepared:
    """The same weights by activations in bfloat16: what OpenVINO does by itself where the processor has it."""
    _ask_for_bfloat16("int4")
    return _prepared(_compressed(name, shape), name, shape, threads, openvino.Type.bf16)


def _compressed(name: str, shape: tuple[int, ...]) -> Any:
    import nncf

    mode = nncf.CompressWeightsMode.INT4_SYM
    return nncf.compress_weights(_model(name, shape), mode=mode, group_size=GROUP, ratio=1.0, all_layers=True)


def _ask_for_bfloat16(format_name: str) -> None:
    if "BF16" not in openvino.Core().get_property("CPU", properties.device.capabilities()):
        raise Missing(f"this processor has no bfloat16: the same as OpenVINO {format_name}")
