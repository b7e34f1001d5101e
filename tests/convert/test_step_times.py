"""``step_times``: counters of the steps of programs, which change nothing but themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tilewright as tw
from tilewright.kernels.cpu import steps
from tilewright.kernels.cpu.replay import Replays
from tilewright.kernels.cpu.replay_counts import counted, described, steps_of

pytestmark = pytest.mark.skipif(steps.why_no_kernels() is not None, reason=str(steps.why_no_kernels()))


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"], autouse=True)
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def network(convert: str = "int8") -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    data = {"calibration_data": [torch.randn(2, 16, 16, 16)]} if convert == "int8" else {}
    return tw.convert_model(nn.Sequential(*layers, nn.Linear(32, 10)).eval(), convert, heads=True, **data)


@pytest.mark.parametrize("convert", ["int8", "fuse"])
def test_every_step_of_a_network_is_counted(convert: str):
    model, x = network(convert), torch.randn(3, 16, 16, 16)
    with torch.inference_mode():
        before = [model(x) for _ in range(4)][-1]
    found = tw.step_times(model, x, calls=7)
    assert {row.calls for row in found.rows} == {7} and all(row.microseconds > 0 for row in found.rows)
    read = [name for row in found.rows for name in row.layers]
    assert {"0", "2"} <= set(read)
    by_layer = {row.layers: row for row in found.rows}
    assert "3 x 3 / 1, 16 to 16, 3 x 14 x 14" in " + ".join((by_layer["0",].what, *by_layer["0",].together))
    # One clock, and steps do not overlap.
    assert sum(row.microseconds for row in found.rows) + found.outside == pytest.approx(found.microseconds)
    assert found.outside > 0 and "outside of steps" in str(found) and "(0)" in str(found)
    with torch.inference_mode():
        assert torch.equal(model(x), before)


def test_counters_change_no_bit_and_end():
    first, second = nn.LayerNorm(64), nn.LayerNorm(64)
    fast, x = Replays(lambda rows: second(first(rows))), torch.randn(9, 64)
    with torch.no_grad():
        before = [fast(x) for _ in range(3)][-1]
        (replay,) = fast.replays
        with counted(replay) as counts:
            assert all(torch.equal(fast(x), before) for _ in range(5))
            with pytest.raises(RuntimeError, match="counted already"), counted(replay):
                pass
            assert [count.calls for count in counts] == [5] * len(counts)
        assert len(counts) == len(steps_of(replay)) == len(replay.sources)
        fast(x)
        assert [count.calls for count in counts] == [5] * len(counts)
        with counted(replay) as again:
            fast(x)
        assert [count.calls for count in again] == [1] * len(again)
    assert all(described(step) for step in steps_of(replay))


def test_steps_that_run_together_count_once():
    """An inverted residual in float is a band; what it is made of stands in its row."""
    torch.manual_seed(0)
    expand, depth, project = (
        nn.Conv2d(16, 96, 1),
        nn.Conv2d(96, 96, 3, padding=1, groups=96),
        nn.Conv2d(96, 16, 1),
    )
    model = nn.Sequential(expand, nn.ReLU6(), depth, nn.ReLU6(), project).eval()
    model = tw.convert_model(model, "fuse", progress=False)
    rows = tw.step_times(model, torch.randn(2, 16, 28, 28), calls=3).rows
    counted_steps = [what for row in rows for what in (row.what, *row.together)]
    assert sum("convolution" in what for what in counted_steps) == 3
    assert {row.calls for row in rows} == {3}


def test_layers_of_a_transformer_have_their_names():
    transformers = pytest.importorskip("transformers", reason="the layers of transformers have the names")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    model = tw.convert_model(transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes)).eval(), "int8")
    rows = tw.step_times(model, torch.arange(9)[None], calls=2).rows
    assert {row.program for row in rows} == {"encoder"}
    products = [row.layers for row in rows if row.what.startswith("int8 product")]
    assert ("layer.0.attention.self.query",) in products and ("layer.1.output.dense",) in products
    assert len(products) == 12
    config = transformers.LlamaConfig(vocab_size=50, **sizes)
    decoder = tw.convert_model(transformers.LlamaForCausalLM(config).eval(), "int8-int4")
    cache = transformers.DynamicCache(config=config)
    with torch.inference_mode():
        decoder(torch.arange(5)[None], past_key_values=cache)
    rows = tw.step_times(decoder, torch.ones(1, 1, dtype=torch.long), past_key_values=cache, calls=4).rows
    assert {row.program for row in rows} == {"model.layers.0", "model.layers.1"} and {row.calls for row in rows} == {4}
    assert sum(row.what.startswith("attention") for row in rows) == 2


def test_what_runs_no_program_says_why():
    with pytest.raises(ValueError, match="Linear runs no program with these arguments"):
        tw.step_times(nn.Linear(8, 8).eval(), torch.randn(2, 8))
    model = network()
    with pytest.raises(ValueError, match="it is in training mode"):
        tw.step_times(model.train(), torch.randn(1, 16, 16, 16))
    with pytest.raises(ValueError, match="at least one"):
        tw.step_times(model.eval(), torch.randn(1, 16, 16, 16), calls=0)
