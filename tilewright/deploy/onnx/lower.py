"""Writes each operator of Tilewright out in ONNX, as the definitions beside the kernels say.

int4 weights        com.microsoft.MatMulNBits; the packed weight bit for bit
int8 weights        DequantizeLinear, then MatMul (QDQ)
int8 activations    by row, found on the fly: ReduceMax, Round, MatMulInteger. Integers are exact
static int8         QuantizeLinear and DequantizeLinear around Conv and MatMul (QDQ). Where ours clamps to -127,
                    QuantizeLinear goes down to -128, which concerns values beyond the calibrated range alone. Marks of
                    what is not finite are sums of 0 * x, added behind the products
2:4 weights         the dense weight with its zeros, then as above: ONNX has no 2:4 products
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tilewright.deploy.onnx.graph import Place
from tilewright.kernels.activation import TABLE
from tilewright.kernels.formats import int4, sparse24

#: Block sizes for which ONNX Runtime has kernels.
BLOCK_SIZES = (256, 128, 64, 32, 16)
#: ``accuracy_level`` of MatMulNBits: what activations are rounded to for the product.
ACCURACY_LEVELS = {"float32": 1, "float16": 2, "bfloat16": 3, "int8": 4}


# ---- weights in the form of MatMulNBits
def nbits_block(group_size: int, k: int) -> int:
    """The largest block that ONNX Runtime knows in which groups of ``group_size`` columns split evenly.

    Raises ValueError if there is none.
    """
    if group_size >= k:  # One group a row: any block will do.
        return next((size for size in reversed(BLOCK_SIZES) if size >= k), BLOCK_SIZES[0])
    found = next((size for size in BLOCK_SIZES if group_size % size == 0), None)
    if found is None:
        raise ValueError(f"MatMulNBits has blocks of 16 to 256 columns, which groups of {group_size} do not split into")
    return found


def nbits_weight(
    weight_packed: torch.Tensor, weight_scale: torch.Tensor, weight_zero: torch.Tensor | None, group_size: int, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, int]:
    """(B uint8 [N, blocks, block / 2], scales [N, blocks], zero points uint8 [N, ceil(blocks / 2)] or None, block).

    B is ``weight_packed`` read as bytes, low nibble first, rows filled up to whole blocks.
    """
    n, block = len(weight_packed), nbits_block(group_size, k)
    blocks = -(-k // block)
    words = torch.nn.functional.pad(weight_packed, (0, blocks * block // 8 - weight_packed.shape[1]))
    data = words.contiguous().view(torch.uint8).reshape(n, blocks, block // 2)
    repeat = blocks if group_size >= k else group_size // block
    scales = weight_scale.repeat_interleave(repeat, dim=1)[:, :blocks]
    if weight_zero is None:
        return data, scales, None, block
    zero = int4.unpack_zero(weight_zero, n).repeat_interleave(repeat, dim=1)[:, :blocks]
    zero = torch.nn.functional.pad(zero, (0, blocks % 2)).reshape(n, -1, 2)
    return data, scales, zero[..., 0] | zero[..., 1] << 4, block


def _float_like(place: Place, x: Any, weight: torch.Tensor) -> torch.Tensor:
    """``weight`` in float16 if ``x`` is, else in float32."""
    return weight.half() if x.dtype == place.types.FLOAT16 else weight.float()


def _matmul_nbits(place: Place, x: Any, k: int) -> Any:
    weight_zero = None if place["weight_zero"] is None else place.tensor("weight_zero")
    packed, scale = place.tensor("weight_packed"), place.tensor("weight_scale")
    data, scales, zero, block = nbits_weight(packed, scale, weight_zero, place["group_size"], k)
    inputs = [
        x,
        place.derived("weight_packed", "weight_nbits", data),
        place.derived("weight_packed", "scales", _float_like(place, x, scales)),
    ]
    if zero is not None:
        inputs.append(place.derived("weight_packed", "zero_points", zero))
    attributes = {"K": k, "N": len(data), "bits": 4, "block_size": block, "accuracy_level": place.accuracy_level}
    return place.write("MatMulNBits", inputs, attributes, "com.microsoft", like=place.node.outputs[0], dtype=x.dtype)


# ---- what surrounds a product
def _activated(place: Place, y: Any, name: str, slope: float = 0.01) -> Any:
    lower = TABLE[name].onnx if name in TABLE else None
    if lower is None:
        raise NotImplementedError(f"{place.op}: the activation {name!r} cannot be written in ONNX yet")

    def write(kind: str, *inputs: Any, **attributes: Any) -> Any:
        values = [place.constant(name, each, y.dtype) if isinstance(each, float) else each for each in inputs]
        return place.write(kind, values, attributes, like=y)

    return lower(write, y, slope)


def _finished(place: Place, y: Any) -> Any:
    """activation(y + bias) + residual, in the type of the result."""
    out, wide = place.node.outputs[0].dtype, y.dtype
    if place["bias"] is not None:
        y = place.write("Add", [y, place.cast(place["bias"], wide)], like=y)
    y = _activated(place, y, place["activation"])
    if place["residual"] is not None:
        y = place.write("Add", [y, place.cast(place["residual"], wide)], like=y)
    return place.cast(y, out)


def _rows_to_int8(place: Place, x: Any, channel_scale: Any = None) -> tuple[Any, Any]:
    """``quantize_per_row``: (int8 [..., K], float32 scale [..., 1])."""
    types = place.types
    v = place.cast(x, types.FLOAT)
    if channel_scale is not None:
        v = place.write("Mul", [v, channel_scale], like=v)
    magnitude = place.write("Abs", [v], like=v)
    last = place.constant("last_axis", [-1], types.INT64)
    largest = place.write("ReduceMax", [magnitude, last], {"keepdims": 1}, dtype=types.FLOAT)
    scale = place.write("Div", [largest, place.constant("steps", 127.0, types.FLOAT)], dtype=types.FLOAT)
    zero = place.write("Equal", [scale, place.constant("nothing", 0.0, types.FLOAT)], dtype=types.BOOL)
    scale = place.write("Where", [zero, place.constant("one", 1.0, types.FLOAT), scale], dtype=types.FLOAT)
    steps = place.write("Round", [place.write("Div", [v, scale], like=v)], like=v)
    bounds = [place.constant("int8_bound", value, types.FLOAT) for value in (-127.0, 127.0)]
    return place.cast(place.write("Clip", [steps, *bounds], like=v), types.INT8), scale


def _integer_product(place: Place, q: Any, scale: Any) -> Any:
    types = place.types
    transposed = place.tensor("weight").t()
    total = place.write("MatMulInteger", [q, place.derived("weight", "weight_int8", transposed)], dtype=types.INT32)
    y = place.write("Mul", [place.cast(total, types.FLOAT), scale], dtype=types.FLOAT)
    return place.write("Mul", [y, place["weight_scale"]], dtype=types.FLOAT)


# ---- one function for each operator, named like it
Lowering = Callable[[Place], None]
LOWERINGS: dict[str, Lowering] = {}


def _lowering(function: Lowering) -> Lowering:
    LOWERINGS[function.__name__.removeprefix("_")] = function
    return function


@_lowering
def _int4_linear(place: Place) -> None:
    k = place["x"].shape[-1]
    place.replace(_finished(place, _matmul_nbits(place, place["x"], k)))


@_lowering
def _int4_int8_linear(place: Place) -> None:
    types = place.types
    q, scale = _rows_to_int8(place, place["x"], place["channel_scale"])
    rounded = place.write("Mul", [place.cast(q, types.FLOAT), scale], dtype=types.FLOAT)
    place.replace(_finished(place, _matmul_nbits(place, rounded, place["x"].shape[-1])))


@_lowering
def _int8_weight_only_linear(place: Place) -> None:
    x = place["x"]
    weight = place.derived("weight", "weight_int8", place.tensor("weight").t())
    named = place.derived("weight", "weight_scale_1d", _float_like(place, x, place.tensor("weight_scale")))
    dequantized = place.write("DequantizeLinear", [weight, named], {"axis": 1}, dtype=x.dtype)
    place.replace(_finished(place, place.write("MatMul", [x, dequantized], dtype=x.dtype)))


@_lowering
def _int8_linear(place: Place) -> None:
    q, scale = _rows_to_int8(place, place["x"], place["channel_scale"])
    place.replace(_finished(place, _integer_product(place, q, scale)))


def _dense(place: Place) -> torch.Tensor:
    """A 2:4 weight with its zeros."""
    return sparse24.unpack(place.tensor("weight_values"), place.tensor("weight_meta"), place["x"].shape[-1])


@_lowering
def _sparse24_linear(place: Place) -> None:
    x = place["x"]
    weight = place.derived("weight_values", "weight", _float_like(place, x, _dense(place)).t())
    place.replace(_finished(place, place.write("MatMul", [x, weight], dtype=x.dtype)))


@_lowering
def _sparse24_int8_linear(place: Place) -> None:
    place.arguments["weight"] = place.derived("weight_values", "weight", _dense(place))
    _int8_linear(place)


@_lowering
def _sparse24_int4_linear(place: Place) -> None:
    weight_zero = None if place["weight_zero"] is None else place.tensor("weight_zero")
    values, meta = place.tensor("weight_values"), place.tensor("weight_meta")
    packed = sparse24.unpack_int4(values, meta, weight_zero, place["group_size"], place["x"].shape[-1])
    place.arguments["weight_packed"] = place.derived("weight_values", "weight_packed", packed)
    _int4_linear(place)


@_lowering
def _int8_linear_quantized(place: Place) -> None:
    types = place.types
    if (known := _static_scale(place["x_scale"])) is not None:
        static, marks = known
        x = place.write("DequantizeLinear", [place["x"], static, _zero_point(place, types.INT8)], dtype=types.FLOAT)
        transposed = place.derived("weight", "weight_int8", place.tensor("weight").t())
        weight = place.write("DequantizeLinear", [transposed, place["weight_scale"]], {"axis": 1}, dtype=types.FLOAT)
        y = _finished(place, place.write("MatMul", [x, weight], dtype=types.FLOAT))
        if marks is not None:
            last = place.constant("last_axis", [-1], types.INT64)
            column = place.cast(place.write("Unsqueeze", [marks, last], dtype=types.FLOAT), y.dtype)
            y = place.write("Add", [y, column], like=y)
        place.replace(y)
        return
    last = place.constant("last_axis", [-1], types.INT64)
    scale = place.write("Unsqueeze", [place["x_scale"], last], dtype=types.FLOAT)
    place.replace(_finished(place, _integer_product(place, place["x"], scale)))


def _static_scale(scale: Any) -> tuple[Any, Any] | None:
    """The one constant that stands in all of ``scale``, and the marks that were added to it; None if there is none."""
    marks = None
    while (node := scale.producer()) is not None and node.op_type in ("Identity", "Expand", "Add"):
        scale, *added = node.inputs
        marks = added[0] if node.op_type == "Add" else marks
    return (scale, marks) if scale.const_value is not None and not scale.shape else None


@_lowering
def _quantize_per_row(place: Place) -> None:
    q, scale = _rows_to_int8(place, place["x"], place["channel_scale"])
    last = place.constant("last_axis", [-1], place.types.INT64)
    place.replace(q, place.write("Squeeze", [scale, last], dtype=scale.dtype))


def _number(place: Place, name: str, value: float) -> Any:
    return place.constant(name, value, place.types.FLOAT)


def _zero_point(place: Place, dtype: Any, value: int = 0) -> Any:
    """Integers are int8, or uint8 that stand for value + 128."""
    return place.constant("zero_point", value + (128 if dtype == place.types.UINT8 else 0), dtype)


@_lowering
def _quantize_per_tensor(place: Place) -> None:
    place.replace(_quantized(place, place["x"], place["scale"], place["zero_point"]))


@_lowering
def _quantize_per_tensor_marked(place: Place) -> None:
    types, x = place.types, place["x"]
    nothing = place.write("Mul", [x, place.constant("nothing", 0.0, x.dtype)], like=x)
    axes = place.constant("axes", list(range(place["sample_dims"], len(x.shape))), types.INT64)
    marks = place.write("ReduceSum", [nothing, axes], {"keepdims": 0}, dtype=x.dtype)
    place.replace(_quantized(place, x, place["scale"], place["zero_point"]), place.cast(marks, types.FLOAT))


def _quantized(place: Place, value: Any, scale: float, zero: int) -> Any:
    types, dtype = place.types, place.node.outputs[0].dtype
    inputs = [place.cast(value, types.FLOAT), _number(place, "scale", scale), _zero_point(place, dtype, zero)]
    return place.write("QuantizeLinear", inputs, dtype=dtype)


def _dequantized(place: Place, value: Any, scale: float, zero: int) -> Any:
    """What a tensor stands for in float32: integers times ``scale``, and so float values if it is not 1."""
    types = place.types
    if value.dtype not in (types.INT8, types.UINT8):
        wide = place.cast(value, types.FLOAT)
        return wide if scale == 1.0 else place.write("Mul", [wide, _number(place, "scale", scale)], like=wide)
    inputs = [value, _number(place, "scale", scale), _zero_point(place, value.dtype, zero)]
    return place.write("DequantizeLinear", inputs, dtype=types.FLOAT)


def _conv(place: Place, x: Any, weight: Any, bias: Any) -> Any:
    top, bottom, left, right = place["padding"]
    attributes = {
        "strides": list(place["stride"]),
        "pads": [top, left, bottom, right],
        "dilations": list(place["dilation"]),
        "group": place["groups"],
    }
    inputs = [x, weight] if bias is None else [x, weight, bias]
    return place.write("Conv", inputs, attributes, dtype=x.dtype)


def _after_conv(place: Place, y: Any, residual: Any) -> Any:
    if residual is not None:
        y = place.write("Add", [y, residual], dtype=y.dtype)
    return _activated(place, y, place["activation"], place["negative_slope"])


@_lowering
def _conv2d_fused(place: Place) -> None:
    x = place["x"]
    oihw = place.derived("weight", "weight_oihw", place.tensor("weight").permute(0, 3, 1, 2))
    bias = None if place["bias"] is None else place.cast(place["bias"], x.dtype)
    residual = None if place["residual"] is None else place.cast(place["residual"], x.dtype)
    place.replace(_after_conv(place, _conv(place, x, oihw, bias), residual))


@_lowering
def _sparse24_conv2d_fused(place: Place) -> None:
    (height, width), channels = place["kernel_size"], place["x"].shape[1] // place["groups"]
    dense = sparse24.unpack(place.tensor("weight_values"), place.tensor("weight_meta"), channels)
    ohwi = _float_like(place, place["x"], dense).reshape(-1, height, width, channels)
    place.arguments["weight"] = place.derived("weight_values", "weight", ohwi)
    _conv2d_fused(place)


@_lowering
def _int8_conv2d_fused(place: Place) -> None:
    types = place.types
    scale = place.tensor("weight_scale")
    oihw = place.derived("weight", "weight_int8", place.tensor("weight").permute(0, 3, 1, 2))
    weight = place.write("DequantizeLinear", [oihw, place["weight_scale"]], {"axis": 0}, dtype=types.FLOAT)
    bias = None
    if place["bias"] is not None:
        # A bias of integers, in units of the products, is what runtimes look for before they multiply in int8.
        unit = scale.double() * place["x_scale"]
        steps = (place.tensor("bias").double() / unit).round().clamp(-(2.0**31) + 1, 2.0**31 - 1).to(torch.int32)
        inputs = [
            place.derived("weight", "bias_int32", steps),
            place.derived("weight", "bias_scale", unit.float()),
        ]
        bias = place.write("DequantizeLinear", inputs, {"axis": 0}, dtype=types.FLOAT)
    residual = None
    if place["residual"] is not None:
        residual = _dequantized(place, place["residual"], place["residual_scale"], place["residual_zero_point"])
    x = _dequantized(place, place["x"], place["x_scale"], place["x_zero_point"])
    y = _conv(place, x, weight, bias)
    y = _after_conv(place, y, residual)
    if place["out_scale"] is None:
        place.replace(place.cast(y, place.node.outputs[0].dtype))
    else:
        place.replace(_quantized(place, y, place["out_scale"], place["out_zero_point"]))


def lower(ir: Any, model: Any, accuracy_level: int) -> None:
    """Write every operator of Tilewright in ``model`` out, in place. Raises NotImplementedError for one it cannot."""
    for node in list(model.graph):
        if node.domain == "tilewright":
            if node.op_type not in LOWERINGS:
                raise NotImplementedError(f"the operator tilewright::{node.op_type} cannot be written in ONNX yet")
            LOWERINGS[node.op_type](Place(ir, node, accuracy_level))
    for node in list(model.graph):
        if node.op_type in ("Max", "Min") and node.inputs[0].dtype in (ir.DataType.INT8, ir.DataType.UINT8):
            _widen(ir, node)
    model.opset_imports.pop("tilewright", None)
    model.opset_imports["com.microsoft"] = 1


def _widen(ir: Any, node: Any) -> None:
    """ONNX Runtime takes the larger of two tensors in int32, not in int8, which pooling of int8 images asks for."""
    narrow, graph = node.inputs[0].dtype, node.graph
    for i, value in enumerate(node.inputs):
        cast = ir.node("Cast", [value], {"to": int(ir.DataType.INT32)})
        cast.outputs[0].type = ir.TensorType(ir.DataType.INT32)
        cast.outputs[0].shape = value.shape
        graph.insert_before(node, cast)
        node.replace_input_with(i, cast.outputs[0])
    (result,) = node.outputs
    back = ir.node("Cast", [result], {"to": int(narrow)})
    back.outputs[0].type, back.outputs[0].shape = result.type, result.shape
    ir.convenience.replace_all_uses_with(result, back.outputs[0], replace_graph_outputs=True)
    back.replace_input_with(0, result)
    result.type = ir.TensorType(ir.DataType.INT32)
    graph.insert_after(node, back)
