"""Group norms of channels-last images, as convolutions in a program hand them on.

PyTorch takes the variance of such images as a difference, E[x^2] - E[x]^2, which leaves few digits where the mean is
large beside the deviation (``findings/torch_group_norm_channels_last.sh``); of contiguous ones it does not. What is
common to a group does not change its norm, so it is taken away before: two passes over the image, where a contiguous
copy takes several times as long.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx, nn

from tilewright.convert.graph import Modules, argument, calls, module_of


def centred(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    """x [N, C, H, W] less the mean of each group of channels, if it is float32 or float64 and not contiguous; any other
    x itself.
    """
    if x.dim() != 4 or x.dtype not in (torch.float32, torch.float64) or not x.numel():
        return x
    if x.is_contiguous() and x.stride(1) != 1:
        return x
    batch, channels = x.shape[:2]
    if channels % num_groups:  # the norm says so
        return x
    mean = x.mean((2, 3)).view(batch, num_groups, -1).mean(-1, keepdim=True)
    return x - mean.expand(-1, -1, channels // num_groups).reshape(batch, channels, 1, 1)


def centre_group_norms(graph: fx.Graph, modules: Modules) -> None:
    """Hand every group norm of ``graph`` images without the mean of their groups."""
    for node in list(graph.nodes):
        groups = _groups_of(node, modules)
        if isinstance(groups, (int, fx.Node)) and node.args and isinstance(node.args[0], fx.Node):
            with graph.inserting_before(node):
                node.update_arg(0, graph.call_function(centred, (node.args[0], groups)))


def _groups_of(node: fx.Node, modules: Modules) -> object:
    """In how many groups ``node`` normalises its first argument, or None."""
    module = module_of(node, modules)
    if isinstance(module, nn.GroupNorm) and type(module).forward is nn.GroupNorm.forward:
        return module.num_groups
    return argument(node, 1, "num_groups") if calls(node, F.group_norm, torch.group_norm) else None
