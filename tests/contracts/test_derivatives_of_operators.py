"""Derivatives and ``torch.vmap`` of every operator that has a card."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.func import jvp, vjp, vmap

from tests.contracts.derivatives import check_first_order, check_second_order, equal_but_for_order, tangents_of
from tilewright.kernels.dispatch.card import Card, cards, make_arguments


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# ---- operators
DIFFERENTIABLE = {card.name: card for card in cards() if not card.name.startswith("quantize_per_tensor")}


def floats_of(card: Card, arguments: dict[str, Any]) -> list[str]:
    """Arguments that the operator can be differentiated by."""
    found = [name for name in card.differentiable if isinstance(arguments.get(name), torch.Tensor)]
    return [name for name in found if arguments[name].is_floating_point()]


@pytest.mark.parametrize("name", sorted(DIFFERENTIABLE))
def test_forward_and_reverse_mode_of_an_operator_agree(name: str) -> None:
    card = DIFFERENTIABLE[name]
    arguments = make_arguments(card.example)
    if "out_dtype" in arguments:
        arguments["out_dtype"], arguments["out_scale"] = torch.float32, None
        arguments = {key: value for key, value in arguments.items() if key != "out_scale" or "conv2d" in name}
    names = floats_of(card, arguments)
    assert names
    operator = getattr(torch.ops.tilewright, name)

    def function(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = operator(**{**arguments, **dict(zip(names, given, strict=True))})
        results = result if isinstance(result, tuple) else (result,)
        return tuple(each for each in results if each.is_floating_point())

    given = tuple(arguments[each] for each in names)
    directions = tangents_of(given)
    (plain,), (value,), (tangent,) = function(*given), *jvp(function, given, directions)
    assert torch.equal(value, plain)
    cotangent = torch.randn_like(plain)
    pulled = vjp(function, *given)[1]((cotangent,))
    leaves = [each.clone().requires_grad_() for each in given]
    by_hand = torch.autograd.grad(function(*leaves), leaves, cotangent)
    forward = (tangent.double() * cotangent.double()).sum()
    scale = tangent.double().norm() * cotangent.double().norm()
    for found in (pulled, by_hand):
        reverse = sum((a.double() * b.double()).sum() for a, b in zip(found, directions, strict=True))
        assert tangent.any() and abs(forward - reverse) <= 1e-5 * scale
    stacked = vmap(function)(*[torch.stack([each, each.flip(0)]) for each in given])[0]
    other = function(*[each.flip(0) for each in given])[0]
    equal_but_for_order(stacked, torch.stack([plain, other]))


@pytest.mark.parametrize(
    "shape, sample_dims", [((3,), 0), ((4, 3), 1), ((4, 3), 0), ((2, 3, 4, 5), 1), ((2, 3, 5), 0), ((2, 4, 3), 2)]
)
def test_vmap_of_what_quantises_with_marks(shape: tuple[int, ...], sample_dims: int) -> None:
    x = torch.randn(3, *shape)
    x[1].view(-1)[0] = torch.nan
    operator = torch.ops.tilewright.quantize_per_tensor_marked
    found = vmap(lambda x: operator(x, 0.02, sample_dims))(x)
    expected = [operator(each, 0.02, sample_dims) for each in x]
    for ours, theirs in zip(found, zip(*expected, strict=True), strict=True):
        assert torch.equal(ours.double().nan_to_num(7), torch.stack(theirs).double().nan_to_num(7))


def test_integers_have_no_derivative() -> None:
    x = torch.randn(3, 8)
    value, tangent = jvp(lambda x: torch.ops.tilewright.quantize_per_tensor(x, 0.1).float(), (x,), (x,))
    assert torch.equal(value, torch.ops.tilewright.quantize_per_tensor(x, 0.1).float())
    assert not tangent.any(), "as of x.to(torch.int8)"


@pytest.mark.parametrize("kind", ["none", "bool", "float", "causal"])
def test_attention(kind: str) -> None:
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6)
    mask = {"bool": torch.rand(5, 5) > 0.4, "float": torch.randn(2, 1, 5, 5)}.get(kind)
    if kind == "bool":
        mask[1] = False  # type: ignore[index]

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.ops.tilewright.attention(q, k, v, mask, kind == "causal")

    def theirs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e9) if mask.dtype == torch.bool else scores + mask
        if kind == "causal":
            scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -1e9)
        y = scores.softmax(-1) @ v
        return torch.where(mask.any(-1, keepdim=True), y, 0) if kind == "bool" else y  # type: ignore[union-attr]

    check_first_order(ours, theirs, (query, key, value))
    check_second_order(
        ours, theirs, tuple(each[:1, :, :2, :3] for each in (query, key, value))
    ) if kind == "none" else None
    batch = [torch.stack([each, each + 1]) for each in (query, key, value)]
    with torch.no_grad():
        equal_but_for_order(vmap(ours)(*batch), torch.stack([ours(*each) for each in zip(*batch, strict=True)]))
        if mask is not None:
            masks = torch.stack([mask, mask.flip(-1)])
            attend = torch.ops.tilewright.attention
            found = vmap(attend, (None, None, None, 0))(query, key, value, masks)
            equal_but_for_order(found, torch.stack([attend(query, key, value, each) for each in masks]))


@pytest.mark.parametrize("kind", ["none", "causal"])
def test_attention_with_sinks(kind: str) -> None:
    query, key, value, sinks = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6), torch.randn(4)
    attend = torch.ops.tilewright.attention

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v, None, kind == "causal", sinks=s)

    def theirs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if kind == "causal":
            scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -1e9)
        scores = torch.cat((scores, s.view(1, 4, 1, 1).expand(2, 4, 5, 1)), dim=-1)
        return scores.softmax(-1)[..., :-1] @ v

    check_first_order(ours, theirs, (query, key, value, sinks))
    others = [(None, None, None, 0), (0, 0, 0, None), (0, 0, 0, 0)]
    with torch.no_grad():
        for dims in others:
            batch = [
                each if d is None else torch.stack([each, each + 1])
                for each, d in zip((query, key, value, sinks), dims, strict=False)
            ]
            samples = [[each if d is None else each[i] for each, d in zip(batch, dims, strict=False)] for i in (0, 1)]
            equal_but_for_order(vmap(ours, dims)(*batch), torch.stack([ours(*each) for each in samples]))


def test_a_convolution_of_integers_with_zero_points() -> None:
    x, residual = (torch.randint(-127, 128, (2, channels, 6, 5), dtype=torch.int8) for channels in (4, 3))
    weight, scale, bias = torch.randint(-127, 128, (3, 3, 3, 4), dtype=torch.int8), torch.rand(3) * 0.01, torch.randn(3)
    zeros = {"x_zero_point": -40, "residual_zero_point": 16}

    def ours(bias: torch.Tensor) -> torch.Tensor:
        return torch.ops.tilewright.int8_conv2d_fused(
            x, 0.02, weight, scale, bias, residual, 0.03, padding=[1, 1, 1, 1], activation="silu", **zeros
        )

    def theirs(bias: torch.Tensor) -> torch.Tensor:
        floats = (weight.double() * scale.double().view(-1, 1, 1, 1)).permute(0, 3, 1, 2)
        y = torch.nn.functional.conv2d((x.double() + 40) * 0.02, floats, bias, padding=1)
        return torch.nn.functional.silu(y + (residual.double() - 16) * 0.03)

    check_first_order(ours, theirs, (bias,))
