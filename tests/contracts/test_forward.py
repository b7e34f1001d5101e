"""What a quantised module promises of its forward."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.contracts.layers import K, Layer, N, each_layer
from tilewright.kernels.dispatch import packed as cache
from tilewright.kernels.dispatch.router import record_problems, route


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@each_layer
def test_output_is_close_to_that_of_the_float_layer(layer: Layer) -> None:
    linear = layer.linear(256, 64)
    x = torch.randn(64, 256)
    error = relative_error(layer.quantize(linear)(x), linear(x))
    # Relative rounding noise of 8 and of 4 bits on Gaussian weights.
    assert error < (0.02 if layer.name.startswith("int8") and "int4" not in layer.name else 0.15)


@each_layer
def test_output_is_that_of_the_dequantised_layer(layer: Layer) -> None:
    """Far closer than to the float layer: what remains is the rounding of activations."""
    module, x = layer.make(), torch.randn(64, K)
    assert relative_error(module(x), F.linear(x, module.dequantize_weight(), module.bias)) < 0.015


@each_layer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_output_has_the_dtype_of_the_input(layer: Layer, dtype: torch.dtype) -> None:
    module = layer.make(dtype=dtype)
    y = module(torch.randn(3, K).to(dtype))
    assert (y.dtype, y.shape) == (dtype, (3, N))


@each_layer
def test_shapes_and_strides(layer: Layer) -> None:
    module, x = layer.make(), torch.randn(24, K)
    flat = module(x)
    assert torch.equal(module(x.view(2, 3, 4, K)), flat.view(2, 3, 4, N))
    assert torch.equal(module(x.t().contiguous().t()), flat)
    assert torch.equal(module(x.repeat(1, 2)[:, :K]), flat)
    assert torch.equal(module(x.view(4, 6, K).transpose(0, 1)), flat.view(4, 6, N).transpose(0, 1))
    image = x.view(2, 3, 4, K).permute(0, 3, 1, 2)  # NCHW, channels-last in memory
    assert torch.equal(module(image.permute(0, 2, 3, 1)), flat.view(2, 3, 4, N))
    assert module(x[0]).shape == (N,)
    torch.testing.assert_close(module(x[0]), flat[0], rtol=0.01, atol=0.01)
    expanded = module(x[:1].expand(24, K))
    assert torch.equal(expanded, expanded[:1].expand(24, N))


@each_layer
def test_empty_batches(layer: Layer) -> None:
    module = layer.make()
    assert module(torch.randn(0, K)).shape == (0, N)
    assert module(torch.randn(2, 0, 3, K)).shape == (2, 0, 3, N)


@each_layer
@pytest.mark.parametrize("k, n", [(1, 1), (0, 5), (5, 0)], ids=["ones", "no_inputs", "no_outputs"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_smallest_layers(layer: Layer, k: int, n: int) -> None:
    linear = layer.linear(k, n)
    module = layer.quantize(linear)
    x = torch.randn(3, k)
    assert module(x).shape == (3, n)
    torch.testing.assert_close(module(x), linear(x), rtol=0.15, atol=0.05)
    assert module.to_float()(x).shape == (3, n)


@each_layer
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
def test_a_row_without_a_number_stays_without_one_and_alone(layer: Layer, bad: float) -> None:
    module, x = layer.make(), torch.randn(6, K)
    clean = module(x)
    x[3, 7] = bad
    x[4] = 0
    y = module(x)
    assert torch.equal(y[[0, 1, 2, 5]], clean[[0, 1, 2, 5]])
    assert not y[3].isfinite().any()
    assert torch.equal(y[4], torch.zeros(N) if module.bias is None else module.bias)


@each_layer
def test_a_huge_value_in_one_row_changes_no_other(layer: Layer) -> None:
    module, x = layer.make(), torch.randn(6, K)
    clean = module(x)
    x[3, 7] = 1e30
    assert torch.equal(module(x)[[0, 1, 2, 4, 5]], clean[[0, 1, 2, 4, 5]])


@each_layer
def test_runs_repeat_to_the_bit_in_any_mode_and_thread(layer: Layer) -> None:
    module, x = layer.make().eval(), torch.randn(20, K)
    first = module(x)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            assert torch.equal(module(x), first)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(y, first) for y in pool.map(lambda _: module(x).detach(), range(20)))


@each_layer
def test_residual_and_activation(layer: Layer) -> None:
    linear, x, residual = layer.linear(), torch.randn(6, K), torch.randn(6, N)
    torch.manual_seed(1)
    module = layer.quantize(linear)
    torch.manual_seed(1)
    fused = layer.quantize(linear, activation="gelu")
    assert torch.equal(module(x, residual), module(x) + residual)
    torch.testing.assert_close(fused(x, residual), F.gelu(module(x)) + residual)


@each_layer
def test_hooks(layer: Layer) -> None:
    module, x = layer.make(), torch.randn(3, K)
    plain = module(x)
    calls: list[str] = []

    def before(_: nn.Module, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        calls.append("before")
        return (given[0] * 2,)

    def after(_: nn.Module, given: Any, y: torch.Tensor) -> torch.Tensor:
        calls.append("after")
        return y + 1

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    doubled = module(x)
    assert calls == ["before", "after"]
    for handle in handles:
        handle.remove()
    assert torch.equal(doubled, module(x * 2) + 1)
    assert torch.equal(module(x), plain)
    gradients: list[torch.Tensor] = []
    module.register_full_backward_hook(lambda _, given, got: gradients.extend(given))
    module(x.requires_grad_()).sum().backward()
    assert gradients[0].shape == x.shape


@each_layer
def test_an_adapter_trains_on_a_quantised_base(layer: Layer) -> None:
    module, x, target = layer.make().requires_grad_(False), torch.randn(16, K), torch.randn(16, N)
    adapter = nn.Sequential(nn.Linear(K, 4), nn.Linear(4, K))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(module(x + adapter(x)), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]


@each_layer
def test_compiles_in_one_graph(layer: Layer) -> None:
    module = layer.make()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for m in (4, 7):
        x = torch.randn(m, K)
        assert torch.equal(compiled(x), module(x))


@each_layer
def test_the_problem_is_the_one_that_forward_poses(layer: Layer) -> None:
    """So that the report names the implementation that runs."""
    module = layer.make()
    with record_problems() as asked:
        module(torch.randn(7, K))
    (posed,) = [problem for problem in asked if problem.op == module.op_name]
    problem = module.problem(7)
    assert posed == problem
    assert route(problem).name


# ---- packing
@each_layer
def test_packed_once_renewed_on_load_and_freed_with_the_module(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    entries = dict(cache._entries.items())
    module, x = layer.make(k=96), torch.randn(4, 96)

    def own() -> list[Any]:
        return [entry for key, entry in cache._entries.items() if key not in entries]

    for _ in range(4):
        module(x)
    made = own()
    for m in (4, 2, 9):
        module(x[:m])
        assert [id(entry) for entry in own()] == [id(entry) for entry in made], "packed again without need"
    if route(module.problem(4)).name in ("oneDNN", "oneDNN by group", "ATen int4pack"):
        assert made
    # A weight that was unpacked and then packed again has two entries, and the first keeps the second.
    count = len(made)
    del made
    other = layer.make(k=96)
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(x), other(x)), "not packed again"
    del other
    assert len(own()) == count
    del module
    gc.collect()
    assert not own()


# ---- bad input
@each_layer
@pytest.mark.parametrize("label", ["", "encoder.layer.0.fc"], ids=["unnamed", "named"])
def test_errors_name_the_layer(layer: Layer, label: str) -> None:
    module = layer.make()
    module.layer_name = label
    words = f"{layer.cls.__name__}" + (f" '{label}'" if label else "")
    with pytest.raises(ValueError, match=rf"{words} takes input whose last dimension is {K}, not .*\[3, {K + 1}\]"):
        module(torch.randn(3, K + 1))
    with pytest.raises(ValueError, match=rf"{words} takes input .* shape \[\]"):
        module(torch.tensor(1.0))
    with pytest.raises(TypeError, match=f"{words} takes float input, not torch.int64"):
        module(torch.ones(3, K, dtype=torch.long))
    with pytest.raises(ValueError, match="residual must have shape"):
        module(torch.randn(3, K), torch.randn(3, N + 1))
    with pytest.raises(ValueError, match="is on meta"):
        module(torch.randn(3, K, device="meta"))
