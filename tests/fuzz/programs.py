"""Random small networks: drawn by Hypothesis as steps, written as the code of an ``nn.Module``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import nn

from tests.fuzz import hazards, parts  # noqa: F401 they register the parts
from tests.fuzz.writer import HAZARDS, PARTS, Writer

#: How Hypothesis searches.
SETTINGS = settings(
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
    report_multiple_bugs=False,
)

INPUTS = {"image": (2, 4, 12, 12), "sequence": (2, 8, 16), "rows": (3, 16), "tokens": (2, 6, 32)}


@dataclass(frozen=True)
class Program:
    """source: the code of a class ``Net``. shape: of its input."""

    source: str
    shape: tuple[int, ...]

    def make(self) -> nn.Module:
        """The network in eval mode, always with the same weights; batch-norms have statistics."""
        scope: dict[str, Any] = {}
        exec(self.source, scope)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = scope["Net"]()
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.running_mean.normal_(0, 0.3)
                    module.running_var.uniform_(0.7, 1.3)
                    if module.affine:
                        nn.init.uniform_(module.weight, 0.7, 1.3)
                        nn.init.normal_(module.bias, 0, 0.3)
        return model.eval()

    def __str__(self) -> str:
        return f"# for an input of shape {self.shape}\n{self.source}"


HEAD = """import torch
import torch.nn.functional as F
from torch import nn

from tests.fuzz import blocks


class Net(nn.Module):
    def __init__(self):
        super().__init__()
"""


def write(steps: list[tuple[str, int, int, int]], kind: str, returned: int) -> Program | None:
    """The program of ``steps``, each a part, how far back its two values lie, and its variant; None if it is empty.

    It answers with what nothing in it reads, and with an older value if ``returned`` says how far back that lies.

    A step that does not fit is left out, so that every list of steps is a program.
    """
    shape = INPUTS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        w = Writer(torch.randn(shape))
        for name, first, second, variant in steps:
            v, u = (w.values[-1 - back % len(w.values)] for back in (first, second))
            counts = len(w.init), len(w.lines), len(w.values), len(w.layers)
            if not PARTS[name](w, v, u, variant):
                del w.init[counts[0] :], w.lines[counts[1] :], w.values[counts[2] :], w.layers[counts[3] :]
            elif max(map(float, (w.value(name).abs().max() for name in w.values))) > 1e4:
                return None
    if not any(takes.endswith(tuple("0123456789")) for _, takes in w.layers):
        return None
    answers = [*w.unread()[-3:], *([w.values[-1 - returned % len(w.values)]] if returned else [])]
    answer = ", ".join(dict.fromkeys(answers)) or w.values[-1]
    source = HEAD + "".join(f"        {line}\n" for line in w.init)
    source += "\n    def forward(self, x):\n" + "".join(f"        {line}\n" for line in w.lines)
    return Program(source + f"        return {answer}\n", shape)


def programs(without: tuple[str, ...] = ()) -> st.SearchStrategy[Program]:
    """Programs. without: hazards that they must not hold."""
    names = [name for name in PARTS if HAZARDS.get(name) not in without]
    near = st.sampled_from([0, 0, 0, 0, 1, 1, 2, 3, 5])
    step = st.tuples(st.sampled_from(names), near, st.sampled_from([1, 1, 2, 3, 0, 4]), st.integers(0, 54))
    steps = st.lists(step, min_size=1, max_size=12)
    found = st.builds(
        write,
        steps,
        st.sampled_from(["image", "image", "image", "image", *INPUTS]),
        st.sampled_from([0, 0, 0, 1, 2, 4]),
    )
    return found.filter(lambda program: program is not None)  # type: ignore[return-value]
