"""Convolutions in the backend: which chains are fused, which not, and that the values stay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.backend.networks import Block, compiled, last, settled


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_chain_of_convolution_norm_add_and_activation_is_one_operator(dynamic: bool) -> None:
    model = settled(Block())
    run = compiled(model, dynamic=dynamic)
    with torch.no_grad():
        for batch in (2, 3):
            x = torch.randn(batch, 8, 7, 9)
            torch.testing.assert_close(run(x), model(x))
    assert [rewrite.what for rewrite in last().rewrites] == [
        "conv + batch-norm + relu",
        "conv + batch-norm + add + relu",
    ]
    assert [rewrite.layer for rewrite in last().rewrites] == ["conv1", "conv2"]


def test_results_keep_their_memory_layout() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU()).eval()
    run = compiled(model)
    with torch.no_grad():
        for x in (torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)):
            found, expected = run(x), model(x)
            torch.testing.assert_close(found, expected)
            assert found.stride() == expected.stride()


def test_convolutions_are_left_alone_where_gradients_are_on() -> None:
    model = settled(Block())
    run = compiled(model)
    loss = run(torch.randn(2, 8, 6, 6)).sum()
    loss.backward()
    assert model.conv1.weight.grad is not None
    assert not last().rewrites
    assert "gradients are on" in last().left["conv1"]


def test_a_batch_norm_in_training_mode_is_not_folded() -> None:
    model = settled(Block())
    model.bn1.train()
    x = torch.randn(4, 8, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(x), model(x))  # both normalise by the batch
    assert [rewrite.what for rewrite in last().rewrites] == ["conv", "conv + batch-norm + add + relu"]


def test_what_else_is_read_is_not_swallowed() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return F.relu(y) + y

    model, x = Twice().eval(), torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(x), model(x))
    assert [rewrite.what for rewrite in last().rewrites] == ["conv"]


def test_a_residual_that_is_overwritten_in_between_is_not_moved_past_the_write() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
            r = r * 1.0
            y = self.conv(x) + r
            r.mul_(3.0)
            return F.relu(y) * r

    model, x, r = Overwrites().eval(), torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(x, r), model(x, r))
    assert [rewrite.what for rewrite in last().rewrites] == ["conv + add"]


def test_a_residual_that_broadcasts_stays_outside() -> None:
    class Broadcasts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
            return self.conv(x) + r

    model, x, r = Broadcasts().eval(), torch.randn(2, 4, 5, 5), torch.randn(4, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(x, r), model(x, r))
    assert [rewrite.what for rewrite in last().rewrites] == ["conv"]


def test_other_convolutions_are_left_alone_with_a_reason() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.ConvTranspose1d(4, 4, 3)).eval()
    x = torch.randn(2, 4, 16)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(x), model(x))
    assert set(last().left) == {"0", "1"}
    assert all("two-dimensional" in reason for reason in last().left.values())
