"""The convolutions once more, in NumPy float64 and int64 and straight from their equations: what references must meet.

Nothing of the package is used here but the activations of ``exact``, which are its own too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.kernels import exact


def sums(x: np.ndarray, weight: np.ndarray, arguments: dict[str, Any]) -> np.ndarray:
    """x [N, C, H, W], weight OHWI [Co, R, S, C / groups] of one dtype -> [N, Co, P, Q], one window at a time."""
    top, bottom, left, right = arguments["padding"]
    (step_h, step_w), (gap_h, gap_w) = arguments["stride"], arguments["dilation"]
    image = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    n, _, height, width = image.shape
    out_channels, r, s, group_channels = weight.shape
    group_outputs = out_channels // arguments["groups"]
    p = (height - gap_h * (r - 1) - 1) // step_h + 1
    q = (width - gap_w * (s - 1) - 1) // step_w + 1
    y = np.zeros((n, out_channels, p, q), x.dtype)
    for o in range(out_channels):
        first = o // group_outputs * group_channels
        for i in range(p):
            for j in range(q):
                rows = slice(i * step_h, i * step_h + gap_h * (r - 1) + 1, gap_h)
                columns = slice(j * step_w, j * step_w + gap_w * (s - 1) + 1, gap_w)
                window = image[:, first : first + group_channels, rows, columns]
                y[:, o, i, j] = (window * weight[o].transpose(2, 0, 1)).sum((1, 2, 3))
    return y


def integers(t: torch.Tensor) -> np.ndarray:
    """The int64 that int8 or offset uint8 stand for."""
    return t.numpy().astype(np.int64) - (128 if t.dtype == torch.uint8 else 0)


def activate(z: np.ndarray, arguments: dict[str, Any]) -> np.ndarray:
    if arguments["activation"] == "leaky_relu":
        return np.where(z < 0, arguments["negative_slope"] * z, z)
    return exact.activate(z, arguments["activation"])


def conv2d_fused(arguments: dict[str, Any]) -> torch.Tensor:
    """The float operator in float64."""
    y = sums(exact.array(arguments["x"]), exact.array(arguments["weight"]), arguments)
    if arguments["bias"] is not None:
        y = y + exact.array(arguments["bias"])[:, None, None]
    if arguments["residual"] is not None:
        y = y + exact.array(arguments["residual"])
    return torch.from_numpy(activate(y, arguments))


def int8_conv2d_fused(arguments: dict[str, Any]) -> torch.Tensor:
    """The int8 operator in float64, before division by out_scale or a cast."""
    total = sums(
        integers(arguments["x"]) - arguments["x_zero_point"], arguments["weight"].numpy().astype(np.int64), arguments
    )
    y = total * (arguments["x_scale"] * exact.array(arguments["weight_scale"]))[:, None, None]
    residual = arguments["residual"]
    if arguments["bias"] is not None:
        y = y + exact.array(arguments["bias"])[:, None, None]
    if residual is not None:
        values = exact.array(residual) if residual.is_floating_point() else integers(residual)
        y = y + (values - arguments["residual_zero_point"]) * arguments["residual_scale"]
    return torch.from_numpy(activate(y, arguments))


def assert_rounded(q: torch.Tensor, y: torch.Tensor, arguments: dict[str, Any]) -> None:
    """``q`` is clamp(round(y / out_scale) + out_zero_point, -127, 127) of the exact ``y``; next to a tie either
    neighbour is right.
    """
    steps = y / arguments["out_scale"]
    expected = (steps.round() + arguments["out_zero_point"]).clamp(-127, 127)
    difference = (torch.from_numpy(integers(q)) - expected).abs()
    # Float32 arithmetic moves y by some 1e-6 of its largest term; a float64 tie may then fall to the other side.
    near_tie = (steps - steps.floor() - 0.5).abs() < 1e-3
    assert (difference[~near_tie] == 0).all()
    assert (difference <= 1).all()
    # In random data few are near a tie: a test in which many are tests nothing.
    assert near_tie.double().mean() < 0.05 or near_tie.sum() < 3
