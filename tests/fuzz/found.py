"""Programs that a conversion once got wrong, as small as they could be made; by the hazard that they hold."""

from __future__ import annotations

import textwrap

from tests.fuzz.programs import HEAD, Program

IMAGE, ROWS = (2, 4, 12, 12), (3, 16)


def program(init: str, forward: str, shape: tuple[int, ...] = IMAGE) -> Program:
    """A program of the lines of its ``__init__`` and its ``forward``."""
    init, forward = (textwrap.indent(textwrap.dedent(text).strip(), " " * 8) for text in (init, forward))
    return Program(f"{HEAD}{init}\n\n    def forward(self, x):\n{forward}\n", shape)


CONV, TWO = (
    "self.m0 = nn.Conv2d(4, 4, 3, padding=1)",
    "self.m1 = nn.Conv2d(4, 4, 3, padding=1)\nself.m2 = nn.Conv2d(4, 4, 1)",
)

FOUND: dict[str, dict[str, Program]] = {
    "alias": {
        "a view of a result is written": program(
            CONV,
            """
            v0 = self.m0(x)
            v0[:, 1:].mul_(2)
            return v0
            """,
        ),
        "between two convolutions": program(
            f"{CONV}\n{TWO}",
            """
            v0 = self.m0(x)
            v0[:, 1:].mul_(2)
            return self.m1(v0)
            """,
        ),
        "a half is written": program(
            CONV,
            """
            v0 = self.m0(x)
            a, b = v0.split(2, dim=1)
            a.mul_(2)
            return v0, b
            """,
        ),
    },
    "in place": {
        "an older name": program(
            CONV,
            """
            v0 = self.m0(x)
            v1 = v0
            v0 += x
            return v1
            """,
        ),
        "past an operator that changes the input": program(
            f"{CONV}\n{TWO}",
            """
            v0 = self.m0(x)
            side = self.m1(v0)
            v0 = F.silu(v0, inplace=True)
            return F.relu(side) + self.m2(v0)
            """,
        ),
        "one activation for all": program(
            f"{CONV}\n{TWO}\nself.act = nn.ReLU(inplace=True)",
            """
            v0 = self.m0(x)
            v1 = self.m1(self.act(v0))
            return self.act(v1 + v0) + self.m2(v0)
            """,
        ),
    },
    "state": {
        "a buffer counts": program(
            f'{CONV}\nself.register_buffer("b0", torch.zeros(()))',
            """
            self.b0 += 1
            return self.m0(x) / self.b0
            """,
        ),
        "a buffer counts beside a linear layer": program(
            'self.m0 = nn.Linear(16, 16)\nself.register_buffer("b0", torch.zeros(()))',
            """
            self.b0 += 1
            return self.m0(x) / self.b0
            """,
            ROWS,
        ),
        "an attribute counts": program(
            f"{CONV}\nself.a0 = 0",
            """
            self.a0 = self.a0 + 1
            return self.m0(x) / self.a0
            """,
        ),
        "a buffer is assigned": program(
            f'{CONV}\nself.register_buffer("b0", torch.ones(()))',
            """
            v0 = self.m0(x)
            self.b0 = self.b0 * 0.9 + v0.mean()
            return v0 - self.b0
            """,
        ),
        "the last call is remembered": program(
            f"{CONV}\nself.a0 = None",
            """
            v0 = self.m0(x)
            v1 = v0 if self.a0 is None or self.a0.shape != v0.shape else v0 + 0.5 * self.a0
            self.a0 = v0
            return v1
            """,
        ),
    },
    "input": {
        "written after it was read": program(
            CONV,
            """
            v0 = self.m0(x)
            x.mul_(0.5)
            return v0
            """,
        ),
        "normalised in place": program(
            CONV,
            """
            x -= x.mean()
            return self.m0(x)
            """,
        ),
        "by an activation": program(
            f"{CONV}\nself.m1 = nn.BatchNorm2d(4)",
            """
            x = F.relu(x, inplace=True)
            return F.relu(self.m1(self.m0(x)))
            """,
        ),
    },
    "weight": {
        "of a linear layer": program("self.m0 = nn.Linear(16, 16)", "return self.m0(x) + x @ self.m0.weight.t()", ROWS),
        "given to a function": program(
            "self.m0 = nn.Linear(16, 16)", "return self.m0(x) + F.linear(x, self.m0.weight)", ROWS
        ),
        "of a convolution": program(CONV, "return self.m0(x) * self.m0.weight.norm()"),
        "of a convolution with a folded batch-norm": program(
            f"{CONV}\nself.m1 = nn.BatchNorm2d(4)", "return self.m1(self.m0(x)) * self.m0.weight.norm()"
        ),
    },
    "range": {
        "a mean of what a ReLU cuts off": program(
            f"{CONV}\n{TWO}",
            """
            v0 = self.m0(x)
            return v0.mean((2, 3)), self.m1(F.relu(v0))
            """,
        ),
        "a sum of what a ReLU cuts off": program(
            f"{CONV}\n{TWO}",
            """
            v0 = self.m0(x)
            return self.m2(v0 + x), self.m1(F.relu(v0))
            """,
        ),
        "a sum of two that a ReLU cuts off": program(
            f"{CONV}\n{TWO}\nself.m3 = nn.Conv2d(4, 4, 3, padding=1)",
            """
            v0 = self.m0(x)
            v1 = self.m3(x)
            return self.m2(v0 + v1), self.m1(F.relu(v0)), self.m1(F.relu(v1))
            """,
        ),
        "a mean of what a part is taken of": program(
            f"{CONV}\nself.m1 = nn.Conv2d(2, 4, 3, padding=1)",
            """
            v0 = self.m0(x)
            v0 = v0 * torch.tensor([1.0, 1.0, 9.0, 9.0])[:, None, None]
            a, b = v0.chunk(2, dim=1)
            return v0.mean((2, 3)), self.m1(a)
            """,
        ),
        "a mean of what a pooling cuts off": program(
            f"{CONV}\n{TWO}",
            """
            v0 = self.m0(x)
            return v0.mean((2, 3)), self.m1(F.max_pool2d(v0, 3))
            """,
        ),
        "a mean of a concatenation": program(
            f"{CONV}\nself.m1 = nn.Conv2d(8, 4, 3, padding=1)\nself.m2 = nn.Conv2d(4, 4, 1)",
            """
            v0 = self.m0(x)
            v1 = torch.cat([v0, self.m2(v0) * 4], 1)
            return v1.mean((2, 3)), self.m1(F.relu(v1))
            """,
        ),
    },
    "size": {
        "of the batch decides": program(
            CONV,
            """
            v0 = self.m0(x)
            return v0 * 2 if v0.shape[0] > 1 else v0 * 3
            """,
        ),
    },
}
