"""What random networks are made of, but for what is easily got wrong: see ``hazards``."""

from __future__ import annotations

from tests.fuzz.writer import Writer, channels, is_image, is_sequence, part


def convolution(w: Writer, v: str, n: int) -> str | None:
    """The name of a new convolution that takes ``v``."""
    dims = w.value(v).dim() - 2
    if dims not in (1, 2):
        return None
    c, size = channels(w, v), min(w.shape(v)[2:])
    kernel, stride, padding, grouped, bias = (
        (3, 1, 1, 0, True),
        (1, 1, 0, 0, True),
        (3, 1, 1, 1, False),
        (3, 2, 1, 0, False),
        (1, 1, 0, 0, False),
        (3, 1, 1, 2, True),
        (3, 1, 0, 0, True),
        (5, 1, 2, 1, True),
        (2, 2, 0, 0, True),
        (3, 2, 1, 1, True),
        (3, 1, 2, 3, True),
    )[n % 11]
    if size + 2 * padding < kernel or size > 40:
        return None
    out = (c, 8, 16, 4, c)[n // 11 % 5]
    groups = 1
    if grouped == 1:
        groups, out = c, c * (1 + n // 11 % 2)
    if grouped == 2 and c % 2 == 0 and out % 2 == 0:
        groups = 2
    more = f", stride={stride}" * (stride > 1) + f", padding={padding}" * (padding > 0)
    more += f", groups={groups}" * (groups > 1) + ", bias=False" * (not bias) + ", dilation=2" * (grouped == 3)
    if grouped == 3 and size + 2 * padding < 5:
        return None
    return w.layer(f"nn.Conv{dims}d({c}, {out}, {kernel}{more})", f"{dims}d of {c}")


@part(3)
def conv(w: Writer, v: str, u: str, n: int) -> bool:
    layer = convolution(w, v, n)
    return layer is not None and w.new(f"{layer}({v})")


@part(4)
def conv_block(w: Writer, v: str, u: str, n: int) -> bool:
    """A convolution with a batch-norm and an activation."""
    layer = convolution(w, v, n)
    if layer is None:
        return False
    w.new(f"{layer}({v})")
    last = w.values[-1]
    if n % 3 < 2:
        norm = w.layer(f"nn.BatchNorm{w.value(last).dim() - 2}d({channels(w, last)})", "")
        w.new(f"{norm}({last})")
        last = w.values[-1]
    if n % 5 == 0:
        return True
    return activation(w, last, u, n)


@part()
def sequential(w: Writer, v: str, u: str, n: int) -> bool:
    if not is_image(w, v) or min(w.shape(v)[2:]) > 40:
        return False
    c = channels(w, v)
    act = ("nn.ReLU()", "nn.ReLU(inplace=True)", "nn.SiLU(inplace=True)", "nn.Hardswish()")[n % 4]
    layer = w.layer(
        f"nn.Sequential(nn.Conv2d({c}, {c}, 3, padding=1, bias=False), nn.BatchNorm2d({c}), {act})", f"2d of {c}"
    )
    return w.new(f"{layer}({v})")


@part(3)
def linear(w: Writer, v: str, u: str, n: int) -> bool:
    if w.value(v).dim() < 2:
        return False
    c = w.shape(v)[-1]
    if w.value(v).dim() == 4:  # the positions of an image move
        if is_image(w, v) and n % 2 == 0:
            layer = w.layer(f"nn.Linear({channels(w, v)}, 32)", f"linear of {channels(w, v)}")
            return w.new(f"{layer}({v}.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)")
        return False
    out = (c, 32, 64, 16)[n % 4]
    layer = w.layer(f"nn.Linear({c}, {out}{', bias=False' * (n % 5 == 1)})", f"linear of {c}")
    return w.new(f"{layer}({v})")


@part(2)
def functional(w: Writer, v: str, u: str, n: int) -> bool:
    """Layers without a module: the network holds their weights itself."""
    dims, shape = w.value(v).dim(), w.shape(v)
    c, features = shape[1], shape[-1]
    if is_image(w, v) and max(shape[2:]) <= 40:
        forms = (
            f"F.conv2d({v}, {{}}, padding=1)|torch.randn(8, {c}, 3, 3) / {3 * c**0.5}",
            f"F.conv2d({v}, {{}}, padding=1, groups={c})|torch.randn({c}, 1, 3, 3) / 3",
            f"F.batch_norm({v}, {{}}, torch.ones({c}))|torch.randn({c})",
            f"F.group_norm({v}, 1, {{}})|torch.rand({c}) + 0.5",
            f"F.conv_transpose2d({v}, {{}}, stride=2)|torch.randn({c}, 4, 2, 2) / {c**0.5}",
        )
    elif dims in (2, 3):
        forms = (
            f"F.linear({v}, {{}})|torch.randn(16, {features}) / {features**0.5}",
            f"F.layer_norm({v}, ({features},), {{}})|torch.rand({features}) + 0.5",
            f"{v} @ {{}}|torch.randn({features}, 32) / {features**0.5}",
            f"torch.einsum('...i,ij->...j', {v}, {{}})|torch.randn({features}, 16) / {features**0.5}",
        )
    else:
        return False
    call, _, weight = forms[n % len(forms)].partition("|")
    return w.new(call.format(w.layer(f"nn.Parameter({weight})")))


@part()
def tied(w: Writer, v: str, u: str, n: int) -> bool:
    """A layer that shares the weight of another."""
    c = w.shape(v)[-1]
    fits = w.weighted(f"linear of {c}")
    if not fits or w.value(v).dim() not in (2, 3):
        return False
    first = fits[n % len(fits)]
    layer = w.layer(f"nn.Linear({c}, {first}.out_features)", f"linear of {c}")
    w.start(f"{layer}.weight = {first}.weight")
    return w.new(f"{layer}({v})")


@part(2)
def block(w: Writer, v: str, u: str, n: int) -> bool:
    """A module of several layers with a forward of its own."""
    if is_image(w, v) and max(w.shape(v)[2:]) <= 40:
        c = channels(w, v)
        kind = ("Residual", "PreActivated", "Picky")[n % 3]
        return w.new(f"{w.layer(f'blocks.{kind}({c})', f'2d of {c}')}({v})")
    if w.value(v).dim() in (2, 3):
        c = w.shape(v)[-1]
        return w.new(f"{w.layer(f'blocks.FeedForward({c})', f'linear of {c}')}({v})")
    return False


@part(2)
def feed_forward(w: Writer, v: str, u: str, n: int) -> bool:
    """A linear layer and an activation right after it."""
    if w.value(v).dim() not in (2, 3):
        return False
    return linear(w, v, u, n) and activation(w, w.values[-1], u, n // 4)


@part(2)
def shared(w: Writer, v: str, u: str, n: int) -> bool:
    """A layer that was called before, once more."""
    dims, c = w.value(v).dim(), w.shape(v)[1]
    fits = [name for name, takes in w.layers if takes == (f"{dims - 2}d of {c}" if dims > 2 else "")]
    fits += [name for name, takes in w.layers if takes == f"linear of {w.shape(v)[-1]}" and dims < 4]
    if not fits or max(w.shape(v)[2:], default=1) > 40 or min(w.shape(v)[2:], default=9) < 5:
        return False
    return w.new(f"{fits[n % len(fits)]}({v})")


@part()
def shared_activation(w: Writer, v: str, u: str, n: int) -> bool:
    fits = [name for name, takes in w.layers if takes == "anything"]
    if not fits:
        fits = [w.layer(("nn.ReLU()", "nn.GELU()", "nn.SiLU()", "nn.Hardswish()")[n % 4], "anything")]
    return w.new(f"{fits[n % len(fits)]}({v})")


@part(hazard="in place")
def shared_activation_in_place(w: Writer, v: str, u: str, n: int) -> bool:
    """One module for all activations, as ResNets have it."""
    fits = [name for name, takes in w.layers if takes == "anything in place"]
    if not fits:
        fits = [w.layer(("nn.ReLU(inplace=True)", "nn.SiLU(inplace=True)")[n % 2], "anything in place")]
    return v != "x" and w.new(f"{fits[n % len(fits)]}({v})")


@part()
def norm(w: Writer, v: str, u: str, n: int) -> bool:
    dims, c = w.value(v).dim(), w.shape(v)[1]
    if dims in (3, 4) and n % 5 < 2:
        affine = ", affine=False" * (n % 3 == 1)
        return w.new(f"{w.layer(f'nn.BatchNorm{dims - 2}d({c}{affine})')}({v})")
    if dims in (3, 4) and n % 5 == 2 and c % 2 == 0 and w.value(v)[0].numel() > 8:
        return w.new(f"{w.layer(f'nn.GroupNorm(2, {c})')}({v})")
    if dims in (2, 3) and w.shape(v)[-1] > 3:
        return w.new(f"{w.layer(f'nn.LayerNorm({w.shape(v)[-1]})')}({v})")
    return False


def lines(text: str) -> list[str]:
    """Forms of code, one a line: {v} and {u} are values, {m} the module that is made by what follows the bar."""
    return [line.strip() for line in text.strip().splitlines()]


ACTIVATIONS = lines("""
    F.relu({v})
    {m}({v})|nn.ReLU()
    {m}({v})|nn.SiLU()
    F.gelu({v})
    torch.sigmoid({v})
    F.hardswish({v})
    {m}({v})|nn.ReLU6()
    F.silu({v})
    {m}({v})|nn.GELU(approximate='tanh')
    F.leaky_relu({v}, 0.1)
    {v}.clamp(min=0)
    torch.tanh({v})
    {v}.relu()
    {m}({v})|nn.Hardsigmoid()
    F.elu({v})
    {m}({v})|nn.PReLU()
""")
INPLACE = lines("""
    {m}({v})|nn.ReLU(inplace=True)
    F.relu({v}, inplace=True)
    {m}({v})|nn.SiLU(inplace=True)
    {v}.relu_()
    torch.relu_({v})
    {m}({v})|nn.Hardswish(inplace=True)
    F.leaky_relu_({v}, 0.1)
    {v}.clamp_(min=-1, max=1)
    {v}.sigmoid_()
    F.silu({v}, inplace=True)
""")


def written(w: Writer, form: str, v: str) -> str:
    call, _, module = form.partition("|")
    return call.format(v=v, m=w.layer(module) if module else "")


@part(2)
def activation(w: Writer, v: str, u: str, n: int) -> bool:
    return w.new(written(w, ACTIVATIONS[n % len(ACTIVATIONS)], v))


@part(2, hazard="in place")
def activation_in_place(w: Writer, v: str, u: str, n: int) -> bool:
    if v == "x":
        return False
    code = written(w, INPLACE[n % len(INPLACE)], v)
    return w.new(code) if n // len(INPLACE) % 2 == 0 else w.run(code)


# ---- several values
@part(3)
def add(w: Writer, v: str, u: str, n: int) -> bool:
    if w.shape(v) != w.shape(u):
        return False
    forms = lines("""
        {v} + {u}
        torch.add({u}, {v})
        {v} + 0.5 * {u}
        {v} - {u}
        {v} * {u}
        torch.add({v}, {u}, alpha=2)
        torch.maximum({v}, {u})
        F.relu({v} + {u})
    """)
    return w.new(forms[n % len(forms)].format(v=v, u=u))


@part(2, hazard="in place")
def add_in_place(w: Writer, v: str, u: str, n: int) -> bool:
    if w.shape(v) != w.shape(u) or v == "x":
        return False
    forms = lines("""
        {v} += {u}
        {v}.add_({u})
        {v} -= 0.5 * {u}
        {v} *= torch.sigmoid({u})
        {v}.mul_({u})
        {v}.copy_({u})
    """)
    return w.run(forms[n % len(forms)].format(v=v, u=u))


@part(2)
def concat(w: Writer, v: str, u: str, n: int) -> bool:
    a, b = w.shape(v), w.shape(u)
    if len(a) != len(b) or len(a) < 3 or a[:1] + a[2:] != b[:1] + b[2:] or a[1] + b[1] > 48:
        return False
    return w.new(f"torch.cat([{v}, {u}], 1)" if n % 2 else f"torch.cat(({u}, {v}), dim=1)")


@part()
def residual(w: Writer, v: str, u: str, n: int) -> bool:
    """A convolution of the same shape whose result is added to what it took."""
    if not is_image(w, v) or max(w.shape(v)[2:]) > 40:
        return False
    c = channels(w, v)
    w.new(f"{w.layer(f'nn.Conv2d({c}, {c}, 3, padding=1)', f'2d of {c}')}({v})")
    last = w.values[-1]
    if n % 2:
        w.new(f"{w.layer(f'nn.BatchNorm2d({c})')}({last})")
        last = w.values[-1]
    return w.new(
        (f"{last} + {v}", f"F.relu({v} + {last})", f"torch.relu({last} + {v})", f"F.silu({last}) + {v}")[n % 4]
    )


@part()
def gate(w: Writer, v: str, u: str, n: int) -> bool:
    """Squeeze and excitation."""
    if not is_image(w, v):
        return False
    c = channels(w, v)
    squeeze = ("F.adaptive_avg_pool2d({v}, 1)", "{v}.mean((2, 3), keepdim=True)")[n % 2].format(v=v)
    a, b = w.layer(f"nn.Conv2d({c}, 4, 1)"), w.layer(f"nn.Conv2d(4, {c}, 1)")
    return w.new(f"{v} * torch.sigmoid({b}(F.relu({a}({squeeze}))))")


@part()
def attention(w: Writer, v: str, u: str, n: int) -> bool:
    if not is_sequence(w, v):
        return False
    c = w.shape(v)[-1]
    q, k, o = (w.layer(f"nn.Linear({c}, {c})", f"linear of {c}") for _ in range(3))
    if n % 2:
        return w.new(f"{o}(torch.softmax({q}({v}) @ {k}({v}).transpose(1, 2) / {c}**0.5, -1) @ {v})")
    return w.new(f"{o}(F.scaled_dot_product_attention({q}({v}), {k}({v}), {v}))")


# ---- sizes
@part()
def pool(w: Writer, v: str, u: str, n: int) -> bool:
    if not is_image(w, v) or min(w.shape(v)[2:]) < 4:
        return False
    forms = lines("""
        {m}({v})|nn.MaxPool2d(2)
        {m}({v})|nn.AvgPool2d(3, 1, 1)
        F.max_pool2d({v}, 3, 2, 1)
        F.avg_pool2d({v}, 2)
        {m}({v})|nn.MaxPool2d(3, 1, 1)
        F.adaptive_avg_pool2d({v}, 4)
        F.max_pool2d({v}, 2, ceil_mode=True)
    """)
    return w.new(written(w, forms[n % len(forms)], v))


@part()
def pad_or_resize(w: Writer, v: str, u: str, n: int) -> bool:
    if not is_image(w, v) or max(w.shape(v)[2:]) > 20 or min(w.shape(v)[2:]) < 3:
        return False
    forms = lines("""
        F.pad({v}, (0, 1, 0, 1))
        F.interpolate({v}, scale_factor=2)
        F.pad({v}, (1, 1, 1, 1), mode='reflect')
        F.interpolate({v}, scale_factor=2, mode='bilinear', align_corners=False)
        F.pad({v}, (1, 1, 1, 1), value=0.5)
        {v}[:, :, 1:, :-1]
        {v}[..., ::2, ::2]
        F.interpolate({v}, size=(8, 8), mode='nearest')
    """)
    return w.new(forms[n % len(forms)].format(v=v))


@part(2)
def pooled(w: Writer, v: str, u: str, n: int) -> bool:
    """From pictures to rows."""
    if not is_image(w, v):
        return False
    forms = lines("""
        {v}.mean((2, 3))
        F.adaptive_avg_pool2d({v}, 1).flatten(1)
        {v}.flatten(2).mean(-1)
        {v}.amax((2, 3))
        {v}.flatten(2).transpose(1, 2)
        {m}({v}).view({v}.shape[0], -1)|nn.AdaptiveAvgPool2d(1)
        {v}.flatten(2)
    """)
    return w.new(written(w, forms[n % len(forms)], v))


@part()
def views(w: Writer, v: str, u: str, n: int) -> bool:
    dims, c = w.value(v).dim(), w.shape(v)[1]
    if dims < 3 or c % 2 or c < 4:
        return False
    if n % 5 < 2:
        return w.several(f"{v}.chunk(2, 1)" if n % 5 else f"{v}.split({c // 2}, dim=1)", 2)
    if n % 5 == 2:
        return w.new(f"{v}[:, : {c // 2}]")
    if n % 5 == 3:
        return w.new(f"{v}.reshape({v}.shape[0], 2, {c // 2}, -1).transpose(1, 2).reshape({v}.shape)")
    return w.new(f"{v}.transpose(-1, -2)" if dims == 3 else f"{v}.permute(0, 1, 3, 2)")


@part()
def scalars(w: Writer, v: str, u: str, n: int) -> bool:
    if n % 4 == 0:
        return w.new(f"{v} * {w.layer('nn.Parameter(torch.tensor(0.7))')}")
    if n % 4 == 1 and w.value(v).dim() == 4:
        return w.new(f"{v} + {w.layer(f'nn.Parameter(torch.randn({channels(w, v)}, 1, 1))')}")
    return w.new(f"{v} * 2 - 0.5" if n % 4 == 2 else f"-{v} / 2")


@part()
def dropout(w: Writer, v: str, u: str, n: int) -> bool:
    forms = lines("""
        F.dropout({v}, 0.5, self.training)
        {m}({v})|nn.Dropout(0.3)
        F.dropout({v}, p=0.2, training=self.training)
    """)
    return w.new(written(w, forms[n % 3], v))


@part()
def branch(w: Writer, v: str, u: str, n: int) -> bool:
    """Control flow that looks at a shape, at the mode or at a value."""
    if n % 4 == 3:
        return w.new(f"{v} if {v}.isnan().any() else {v} * 0.5")
    if n % 3 == 0:
        return w.new(f"{v} * 2 if {v}.shape[0] > 1 else {v} * 2")
    if n % 3 == 1 and is_image(w, v):
        return w.new(f"{v} if {v}.shape[-1] > 8 else {v} + 1")
    return w.new(f"{v} + 1 if self.training else {v}")
