"""Is a result what the operator's definition says? One answer for every implementation, config and device."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from bench.problems import QUANTIZERS, dense_weight, exact_result, plain_result
from tests.tolerance import assert_close_as_plain, ulp
from tilewright.kernels.quantize.reference import quantize_per_row


def check(op: str, actual: Any, arguments: dict[str, Any]) -> None:
    """``actual`` against the definition. ``arguments`` are on the CPU."""
    if op == "quantize_per_row":
        q, scale = quantize_per_row(**arguments)
        assert torch.equal(actual[1].cpu(), scale), "the scales differ"
        assert torch.equal(actual[0].cpu(), q), "the integers differ"
    elif op in QUANTIZERS:
        check_norm(actual[0].cpu(), actual[1].cpu(), arguments)
    else:
        assert_close_as_plain(actual.cpu(), plain_result(op, arguments), exact_result(op, arguments))


def check_norm(q: torch.Tensor, scale: torch.Tensor, arguments: dict[str, Any]) -> None:
    """Rounding of the norm may move a value across a rounding boundary, so q is held to half a step around float64.

    A scale comes from one element of its row, where plain PyTorch may lose nothing by chance: it is held to what plain
    PyTorch loses at the worst element.
    """
    exact, plain = normalised(arguments, torch.float64), normalised(arguments, torch.float32)
    top = exact.abs().amax(-1)
    lost = 2 * (plain.double() - exact).abs().amax()
    assert ((scale.double() - top / 127).abs() <= lost / 127 + ulp(top / 127, torch.float32)).all(), "the scales differ"
    slack = lost + ulp(top.unsqueeze(-1), torch.float32)
    distance = (q.double() * scale.double().unsqueeze(-1) - exact).abs()
    assert (distance <= 0.5 * scale.double().unsqueeze(-1) * (1 + 2**-20) + slack).all(), "not the nearest integer"


def normalised(arguments: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
    """The norm before it is quantised."""
    x, weight = (arguments[name].to(dtype) for name in ("x", "weight"))
    if "bias" in arguments:
        return F.layer_norm(x, x.shape[-1:], weight, arguments["bias"].to(dtype), 1e-5)
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def check_dense_weight(actual: torch.Tensor, arguments: dict[str, Any]) -> None:
    """What the int4 dequantiser writes: (u - z) * s rounded once from float32, in columns that are of the weight."""
    k = arguments["x"].shape[-1]
    exact = dense_weight("int4_linear", arguments)
    assert torch.equal(actual.cpu()[:, :k], exact.float().to(actual.dtype)), "the weights differ"
