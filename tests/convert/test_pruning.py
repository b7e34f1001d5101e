"""2:4 pruning of one weight, of a model, held while it trains, and searched under a budget."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tilewright as tw
from tilewright.convert.compress.pruning import prune, prune_magnitude, prune_sparsegpt, prune_wanda
from tilewright.convert.search.prune_model import as_rows
from tilewright.kernels.formats import sparse24

SIZES = [(5, 16), (7, 130), (3, 3), (4, 1), (2, 6), (6, 300)]


def rows_of(k: int, count: int = 400, seed: int = 0) -> torch.Tensor:
    """Correlated inputs of very different sizes, as networks have them."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=g) / k**0.5 + 0.5 * torch.eye(k)
    return torch.randn(count, k, generator=g) @ mix * torch.logspace(-1, 1, k)[torch.randperm(k, generator=g)]


def weight_of(n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(1))


def output_error(weight: torch.Tensor, pruned: torch.Tensor, rows: torch.Tensor) -> float:
    exact = rows.double() @ weight.double().t()
    return float((rows.double() @ pruned.double().t() - exact).norm() / exact.norm())


# ---- one weight
@pytest.mark.parametrize("n, k", SIZES)
def test_magnitude_keeps_the_largest_two_of_four(n: int, k: int) -> None:
    weight = weight_of(n, k)
    pruned = prune_magnitude(weight)
    for row, start in itertools.product(range(n), range(0, k, 4)):
        group = weight[row, start : start + 4].abs()
        kept = pruned.mask[row, start : start + 4]
        assert kept.sum() == min(2, len(group))
        assert set(group[kept].tolist()) == set(sorted(group.tolist(), reverse=True)[:2])
    assert torch.equal(pruned.weight, weight * pruned.mask)


@pytest.mark.parametrize("n, k", SIZES)
def test_wanda_weighs_by_the_norm_of_the_input(n: int, k: int) -> None:
    weight, rows = weight_of(n, k), rows_of(k)
    pruned = prune_wanda(weight, rows)
    scores = weight.double().abs() * rows.double().square().sum(0).sqrt()
    expected = sparse24.best_mask(scores)
    assert torch.equal(pruned.mask, expected)
    assert torch.equal(pruned.weight, weight * expected)
    assert torch.equal(prune_wanda(weight, rows.new_ones(3, k)).mask, prune_magnitude(weight).mask)


@pytest.mark.parametrize("n, k", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_pruning_is_2_4_in_the_dtype_that_came(n: int, k: int, dtype: torch.dtype) -> None:
    weight, rows = weight_of(n, k).to(dtype), rows_of(k)
    before = weight.clone()
    for name in ("magnitude", "wanda", "sparsegpt"):
        pruned = prune(weight, name, rows)
        assert sparse24.why_not_24(pruned.mask) is None
        assert pruned.weight.dtype == dtype
        assert not pruned.weight[~pruned.mask].any()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("n, k", [(16, 64), (8, 130), (12, 256)])
def test_sparsegpt_errs_least_and_magnitude_most(n: int, k: int) -> None:
    weight, rows = weight_of(n, k), rows_of(k)
    errors = [
        output_error(weight, prune(weight, name, rows).weight, rows) for name in ("sparsegpt", "wanda", "magnitude")
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.9 * errors[1]


def test_sparsegpt_adjusts_what_a_given_mask_keeps() -> None:
    """Towards least squares, which has no better answer for this mask."""
    weight, rows = weight_of(6, 32), rows_of(32)
    mask = prune_magnitude(weight).mask
    adjusted = prune_sparsegpt(weight, rows, mask)
    assert torch.equal(adjusted.mask, mask)
    best = torch.zeros_like(weight, dtype=torch.float64)
    for row in range(6):
        kept = mask[row]
        target = rows.double() @ weight[row].double()
        best[row, kept] = torch.linalg.lstsq(rows[:, kept].double(), target).solution
    errors = [output_error(weight, w, rows) for w in (best, adjusted.weight, weight * mask)]
    assert errors == sorted(errors)
    assert errors[1] < 0.95 * errors[2]


def test_sparsegpt_equals_its_equations_column_by_column() -> None:
    """The same sweep with the inverse Hessian updated by Gaussian elimination, as Optimal Brain Surgeon has it."""
    n, k, damping = 3, 12, 0.01
    weight, rows = weight_of(n, k), rows_of(k)
    hessian = rows.double().t() @ rows.double()
    hessian += damping * hessian.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    left, mask = weight.double().clone(), torch.zeros(n, k, dtype=torch.bool)
    inverse = torch.linalg.inv(hessian)
    for j in range(k):
        if j % 4 == 0:
            pivots, trailing = [], inverse.clone()
            for i in range(4):  # [H^-1]_ii with the columns before it gone
                pivots.append(trailing[i, i])
                trailing = trailing - torch.outer(trailing[:, i], trailing[i]) / trailing[i, i]
            mask[:, j : j + 4] = sparse24.best_mask(left[:, j : j + 4].square() / torch.stack(pivots))
        dropped = torch.where(mask[:, j], 0.0, left[:, j])
        left[:, j:] -= torch.outer(dropped / inverse[0, 0], inverse[0])
        inverse = (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    pruned = prune_sparsegpt(weight, rows, damping=damping)
    assert torch.equal(pruned.mask, mask)
    torch.testing.assert_close(pruned.weight.double(), left * mask, rtol=1e-5, atol=1e-6)


def test_inputs_that_say_little_do_not_break_sparsegpt() -> None:
    weight = weight_of(4, 64)
    for rows in (torch.zeros(5, 64), torch.ones(1, 64), torch.randn(3, 64), rows_of(64) * 1e-20, rows_of(64) * 1e15):
        pruned = prune_sparsegpt(weight, rows)
        assert torch.isfinite(pruned.weight).all()
        assert sparse24.why_not_24(pruned.weight) is None


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"pruning": "random"}, "pruning must be one of magnitude, wanda, sparsegpt, not 'random'"),
        ({"pruning": "wanda"}, "'wanda' needs rows"),
        ({"pruning": "wanda", "rows": torch.ones(3, 7)}, r"shape \[R, 8\] with R > 0, not \[3, 7\]"),
        ({"pruning": "sparsegpt", "rows": torch.full((3, 8), torch.nan)}, "rows must be finite"),
        ({"mask": torch.ones(4, 8, dtype=torch.bool)}, "the mask is not 2:4: row 0 keeps 4 of the columns 0 to 3"),
        ({"mask": torch.ones(4, 4, dtype=torch.bool)}, r"mask of shape \[4, 4\] does not fit"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        prune(torch.randn(4, 8), **arguments)


# ---- a model
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def images(count: int = 32) -> torch.Tensor:
    return torch.randn(count, 8, 6, 6, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("pruning", ["magnitude", "wanda", "sparsegpt"])
def test_a_pruned_model_is_2_4_and_the_original_as_it_was(pruning: str) -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruned = tw.prune_model(model, pruning, calibration_data=[images()])
    for name in ("0", "3", "5"):
        weight = pruned.get_submodule(name).weight
        assert sparse24.why_not_24(as_rows(weight)) is None
        assert (weight != 0).float().mean() == 0.5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(pruned[3]) is nn.Linear


def test_convolutions_are_pruned_along_their_input_channels() -> None:
    pruned = tw.prune_model(network())
    weight = pruned[0].weight
    assert ((weight != 0).reshape(16, 2, 4, 3, 3).sum(2) == 2).all()


def test_given_masks_decide_and_leave_all_else_alone() -> None:
    model = network()
    mask = sparse24.best_mask(torch.rand(64, 256))
    pruned = tw.prune_model(model, masks={"3": mask})
    assert torch.equal(pruned[3].weight, model[3].weight * mask)
    assert torch.equal(pruned[5].weight, model[5].weight)
    with pytest.raises(ValueError, match="layer '3': the mask is not 2:4"):
        tw.prune_model(model, masks={"3": torch.ones(64, 256, dtype=torch.bool)})
    with pytest.raises(ValueError, match="nearest layer names"):
        tw.prune_model(model, masks={"nine": mask})
    with pytest.raises(ValueError, match="'wanda' needs calibration_data"):
        tw.prune_model(model, "wanda")


def test_held_masks_keep_the_zeros_through_training() -> None:
    model = tw.prune_model(network())
    x, y = images(), torch.randint(10, (32,))
    kinds = (torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01))
    with tw.hold_masks(model) as held:
        assert set(held.masks) == {"0", "3", "5"}
        for kind in kinds:
            optimizer = kind(model.parameters())
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        for name, mask in held.masks.items():
            weight = model.get_submodule(name).weight
            assert not weight[~mask].any()
            assert weight[mask].all()
        with torch.no_grad():
            model[3].weight.add_(1.0)
        held.reapply()
        assert not model[3].weight[~held.masks["3"]].any()
    F.cross_entropy(model(x), y).backward()
    assert model[3].weight.grad[~held.masks["3"]].any(), "removed at the end of the block"
    with pytest.raises(ValueError, match="no 2:4 weight"):
        tw.hold_masks(network())


def test_a_trained_pruned_model_converts_as_it_is() -> None:
    model = tw.prune_model(network()).eval()
    converted = tw.convert_model(model, {"*": tw.Sparse24(compute_dtype=None), "0": None}, heads=True)
    x = images()
    torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5)
    for name in ("3", "5"):
        assert torch.equal(converted.get_submodule(name).dequantize_weight(), model.get_submodule(name).weight)


# ---- search
def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.Tanh())))


def test_search_prunes_as_much_as_the_budget_allows() -> None:
    model, data = encoder(), [torch.randn(64, 64), torch.randn(16, 64)]
    found = [tw.search_pruning(model, data, budget) for budget in (0.0, 0.2, 0.35, 10.0)]
    counts = [sum(layer.pruned for layer in one.layers) for one in found]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 4)
    assert found[0].recipe is None
    for one in found:
        assert one.error <= one.budget
        assert [layer.error for layer in one.layers] == sorted(layer.error for layer in one.layers)
        assert all(layer.saved > 0 for layer in one.layers)
        assert f"budget {one.budget:.4g}" in str(one)
    chosen = next(one for one in found if 0 < sum(layer.pruned for layer in one.layers) < 4)
    assert "kept dense" in str(chosen)
    converted = tw.convert_model(model, chosen.recipe, calibration_data=data, fuse=False)
    names = {layer.name for layer in chosen.layers if layer.pruned}
    assert {layer.name for layer in tw.report(converted).converted} == names
    with torch.no_grad():
        ours, theirs = (torch.cat([m(item) for item in data]) for m in (converted, model))
    assert float((ours - theirs).norm() / theirs.norm()) == pytest.approx(chosen.error, rel=1e-3)


def test_search_with_a_measure_of_its_own() -> None:
    model = encoder()
    asked = []

    def measure(other: nn.Module) -> float:
        asked.append(other)
        return float(sum(type(m).__name__ == "Sparse24Linear" for m in other.modules()))

    found = tw.search_pruning(model, [torch.randn(8, 64)], 2, measure=measure)
    assert sum(layer.pruned for layer in found.layers) == 2
    assert found.error == 2.0
    assert asked
    with pytest.raises(ValueError, match="budget must not be negative"):
        tw.search_pruning(model, [torch.randn(8, 64)], -1)
