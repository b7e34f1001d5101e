"""Parts that are easily got wrong when a program is rewritten: aliases, state, the input, weights that others read."""

from __future__ import annotations

from tests.fuzz.parts import Writer, channels, is_image, lines, part, written


@part(2, hazard="alias")
def write_into_view(w: Writer, v: str, u: str, n: int) -> bool:
    if v == "x" or w.value(v).dim() < 2:
        return False
    forms = lines("""
        {v}[:, :1] += 1
        {v}[:, 0] = 0
        {v}[:, 1:].mul_(2)
        {v}.view(-1)[0] = 3
        {v}[:1].neg_()
        {v}[:, :1].zero_()
    """)
    if n % 6 == 3 and not w.value(v).is_contiguous():
        return False
    return w.run(forms[n % 6].format(v=v))


@part(hazard="alias")
def alias(w: Writer, v: str, u: str, n: int) -> bool:
    forms = ("{v}.detach()", "{v}[:]", "{v}.view_as({v})", "{m}({v})|nn.Identity()", "{v}.contiguous()")
    return v != "x" and w.new(written(w, forms[n % 5], v))


@part(hazard="state")
def counter(w: Writer, v: str, u: str, n: int) -> bool:
    if n % 4 == 0:
        name = w.buffer("torch.zeros(())")
        return w.run(f"{name} += 1") and w.new(f"{v} / {name}")
    if n % 4 == 1:
        name = w.attribute("0")
        return w.run(f"{name} = {name} + 1") and w.new(f"{v} + 1 / {name}")
    if n % 4 == 2:
        name = w.buffer("torch.ones(())")
        return w.run(f"{name} = {name} * 0.9 + {v}.mean()") and w.new(f"{v} - {name}")
    name = w.buffer("torch.zeros((), dtype=torch.long)")
    return w.run(f"{name}.add_(1)") and w.new(f"{v} / 2 if {name} > 1 else {v}")


@part(hazard="state")
def remembers(w: Writer, v: str, u: str, n: int) -> bool:
    """The value of the last call is kept for the next one."""
    name = w.attribute("None")
    w.new(f"{v} if {name} is None or {name}.shape != {v}.shape else {v} + 0.5 * {name}")
    return w.run(f"{name} = {v}")


@part(hazard="state")
def counting_block(w: Writer, v: str, u: str, n: int) -> bool:
    if not is_image(w, v):
        return False
    return w.new(f"{w.layer(f'blocks.Counting({channels(w, v)})')}({v})")


@part(hazard="input")
def write_into_input(w: Writer, v: str, u: str, n: int) -> bool:
    return w.run(
        ("x.mul_(0.5)", "x -= x.mean()", "x[:, :1] = 0", "x.clamp_(-1, 1)", "x.relu_()", "F.relu(x, inplace=True)")[
            n % 6
        ]
    )


@part(hazard="weight")
def reads_weight(w: Writer, v: str, u: str, n: int) -> bool:
    """A weight that is read by somebody else than its layer."""
    c = w.shape(v)[-1]
    fits = w.weighted(f"linear of {c}")
    if fits and w.value(v).dim() < 4:
        name = fits[n % len(fits)]
        return w.new((f"F.linear({v}, {name}.weight)", f"{v} @ {name}.weight.t()")[n % 2])
    fits = w.weighted(f"2d of {w.shape(v)[1]}")
    if not fits or w.value(v).dim() != 4:
        return False
    return w.new(f"{v} * {fits[n % len(fits)]}.weight.norm()")
