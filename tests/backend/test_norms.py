"""Norms in the backend: they quantise where int8 layers alone read them and there is a kernel for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

import tilewright as tw
from tests.backend.networks import Feed, compiled, last
from tilewright.kernels import norm_quantize
from tilewright.kernels.dispatch import router


class LlamaNorm(nn.Module):
    """RMS norm as transformers writes it."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(width) + 0.5), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * x.to(dtype)


@pytest.fixture
def kernels_for_norms() -> Iterator[None]:
    """As if this CPU had kernels for norms that quantise, which only GPUs have."""
    where = f"{norm_quantize.__name__}.reference"
    ops = ("layer_norm_quantize", "rms_norm_quantize")
    for op in ops:
        router.register(router.Implementation("test", op, lambda problem: None, f"{where}:{op}"), before="reference")
    yield
    for op in ops:
        router.unregister(op, "test")


@pytest.mark.usefixtures("kernels_for_norms")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm, LlamaNorm])
def test_a_norm_before_int8_layers_quantises(kind: type[nn.Module], dynamic: bool) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = kind(64)
            self.q, self.k = nn.Linear(64, 32), nn.Linear(64, 48)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(x)
            return torch.cat([self.q(y), F.silu(self.k(y))], -1)

    model = Attention().eval()
    nn.init.normal_(model.norm.weight)
    run = compiled(model, recipe="int8", dynamic=dynamic)
    converted = tw.convert_model(model, "int8")
    with torch.no_grad():
        for rows in (3, 5):
            x = torch.randn(rows, 4, 64)
            # One step of an activation may round the other way: 1/127 of the largest value of its row.
            torch.testing.assert_close(run(x), converted(x), rtol=0.02, atol=0.02)
    (norm,) = [rewrite for rewrite in last().rewrites if rewrite.kind == "norm"]
    assert norm.layer == "norm" and "2 int8 linear layers" in norm.what


@pytest.mark.usefixtures("kernels_for_norms")
def test_a_norm_takes_over_the_input_scales_of_calibrated_layers() -> None:
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 32)).eval()
    data = [torch.randn(64, 64) * torch.logspace(-1, 1, 64)]
    converted = tw.convert_model(model, {"1": "int8"}, calibration_data=data)
    assert converted[1].channel_scale is not None
    with torch.no_grad():
        torch.testing.assert_close(compiled(converted)(data[0]), converted(data[0]), rtol=0.02, atol=0.05)
    assert last().count("norm") == 1


@pytest.mark.usefixtures("kernels_for_norms")
def test_a_norm_that_something_else_reads_stays() -> None:
    class PostNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(64), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(x)
            return self.linear(y) + y

    with torch.no_grad():
        compiled(PostNorm().eval(), recipe="int8")(torch.randn(2, 64))
    assert last().count("norm") == 0


def test_a_norm_stays_where_only_the_definition_would_serve_it() -> None:
    with torch.no_grad():
        compiled(Feed().eval(), recipe="int8")(torch.randn(2, 64))
    assert "no kernel but the definition" in last().left["norm"]


@pytest.mark.usefixtures("kernels_for_norms")
@pytest.mark.parametrize("mode", ["tangent", "gradient", "dual"])
def test_a_norm_that_is_differentiated_stays(mode: str) -> None:
    model = tw.convert_model(nn.Sequential(LlamaNorm(32), nn.Linear(32, 8)).eval(), "int8")
    x, v = torch.randn(4, 32), torch.randn(4, 32)
    level = forward_ad.dual_level() if mode == "dual" else contextlib.nullcontext()

    def differentiate(run: Callable[..., torch.Tensor]) -> torch.Tensor:
        if mode == "dual":
            return forward_ad.unpack_dual(run(forward_ad.make_dual(x, v))).tangent.clone()
        return run(x, v)

    def transformed(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if mode == "tangent":
            return torch.func.jvp(model, (x,), (v,))[1]
        return torch.func.grad(lambda x: (model(x) * v[:, :8]).sum())(x)

    function = model if mode == "dual" else transformed
    torch._dynamo.reset()
    with torch.no_grad(), level:
        expected = differentiate(function)
        found = differentiate(compiled(function))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert expected.any()
    said = [*last().left.values(), *last().notes]
    assert any("gradients are on" in each or "torch.func" in each for each in said)
