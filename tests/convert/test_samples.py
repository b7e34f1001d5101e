"""Calibration data as people have it: what the model is called on, and what is said where it cannot be."""

from __future__ import annotations

import collections
import logging
import queue
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import tilewright as tw
from tests.convert.networks import SmallResNet, settled
from tilewright.convert import calibrate, timing

#: What models were called on, the latest at the end. No list: the converter puts back what a forward writes to one.
CALLS: queue.SimpleQueue[Any] = queue.SimpleQueue()


def calls() -> list[Any]:
    """All of them; from now on there are none."""
    return [CALLS.get() for _ in range(CALLS.qsize())]


class Net(nn.Module):
    """Writes down what it is called on."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        CALLS.put(x)
        return self.fc(x)


class Texts(nn.Module):
    """As an encoder of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(30, 64), nn.Linear(64, 64)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert input_ids is not None
        CALLS.put((input_ids, attention_mask, labels))
        return self.fc(self.embed(input_ids))


class Features(Texts):
    """As a SentenceTransformer."""

    def forward(self, features: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return super().forward(features["input_ids"], features["attention_mask"])


class Handing(nn.Module):
    """Hands on whatever it is given."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def x(rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))


def ids() -> torch.Tensor:
    return torch.arange(8).reshape(2, 4)


def seen(model: Any, data: Any, **options: Any) -> list[Any]:
    """What the data make of calls: by pruning, which needs each of them once."""
    calls()
    pruned = tw.prune_model(model.eval(), "wanda", calibration_data=data, **options)
    assert int((pruned.get_parameter("fc.weight") == 0).sum()) == 64 * 32
    return calls()


def same(actual: list[Any], expected: list[Any]) -> bool:
    return len(actual) == len(expected) and all(
        (a is None) == (b is None) and (a is None or (a.dtype == b.dtype and torch.equal(a, b)))
        for a, b in zip(actual, expected, strict=True)
    )


# ---- what works
class Rows(Dataset):
    """A dataset that is indexed, and ends by its length alone."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return x(index + 1), index


def generated() -> Iterator[torch.Tensor]:
    yield x(2)
    yield x(3)


FORMS: dict[str, tuple[Callable[[], Any], list[torch.Tensor]]] = {
    "tensors": (lambda: [x(2), x(3)], [x(2), x(3)]),
    "rows-of-a-tensor": (lambda: x(2), [*x(2)]),
    "rows-of-an-array": (lambda: x(2).double().numpy(), [*x(2)]),
    "a-mapping": (lambda: {"x": x()}, [x()]),
    "batches-with-labels": (
        lambda: DataLoader(TensorDataset(x(4), torch.arange(4)), batch_size=2),
        [x(4)[:2], x(4)[2:]],
    ),
    "image-label-index": (lambda: [(x(), torch.arange(4), "name")], [x()]),
    "a-dataset": (Rows, [x(1), x(2), x(3)]),
    "named-tuples": (lambda: [collections.namedtuple("Batch", "image label")(x(), 3)], [x()]),
    "dicts-with-labels": (lambda: [{"x": x(), "label": torch.arange(4), "path": "a.png"}], [x()]),
    "float64-arrays": (lambda: [x().double().numpy(), (x(3).numpy(),), {"x": x(2).numpy()}], [x(), x(3), x(2)]),
    "read-only-arrays": (lambda: [np.broadcast_to(x(1).numpy(), (3, 64))], [x(1).expand(3, 64)]),
    "a-generator": (generated, [x(2), x(3)]),
    "a-deque": (lambda: collections.deque([x()]), [x()]),
    "keys-and-values": (lambda: {"one": x(1), "two": x(2)}.values(), [x(1), x(2)]),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_data(form: str) -> None:
    make, expected = FORMS[form]
    assert same(seen(Net(), make()), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_float_arrays_have_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(64, 64), Net()).to(dtype)
    (found,) = calibrate.samples(model, [x().numpy()])
    assert found.dtype == dtype


def test_integers_and_flags_stay_what_they_are() -> None:
    arrays = {"input_ids": ids().numpy(), "attention_mask": np.ones((2, 4), dtype=bool)}
    assert same([*seen(Texts(), [arrays])[0]], [ids(), torch.ones(2, 4, dtype=torch.bool), None])


def test_lists_within_an_item_stay_lists() -> None:
    class Pyramid(Net):
        def forward(self, x: list[torch.Tensor], sizes: tuple[int, ...] = ()) -> torch.Tensor:
            assert type(x) is list and all(type(size) is int for size in sizes)
            return super().forward(torch.cat(x))

    assert same(seen(Pyramid(), [([x(1), x(2).double().numpy()],), ([x(1)], (1, 2))]), [torch.cat([x(1), x(2)]), x(1)])


def test_what_forward_names_is_taken_and_what_it_has_no_name_for_is_not() -> None:
    data = [{"input_ids": ids(), "labels": ids(), "idx": 3, "sentence": "a"}]
    assert same([*seen(Texts(), data)[0]], [ids(), None, ids()])


def test_a_tuple_that_fits_stays_positional() -> None:
    assert same([*seen(Texts(), [(ids(), ids() > 0)])[0]], [ids(), ids() > 0, None])


def test_what_a_tokenizer_returns() -> None:
    transformers = pytest.importorskip("transformers", reason="its tokenizers make such inputs")
    batch = transformers.BatchEncoding({"input_ids": ids(), "attention_mask": ids() > 0, "token_type_ids": ids()})
    for data in ([batch], batch, [{"input_ids": ids().numpy(), "attention_mask": (ids() > 0).numpy()}]):
        assert same([*seen(Texts(), data)[0]], [ids(), ids() > 0, None])


def test_one_dict_of_features() -> None:
    features = {"input_ids": ids(), "attention_mask": ids() > 0}
    for item in (features, (features,), [features], {**features, "label": 3}):
        assert same([*seen(Features(), [item])[0]], [ids(), ids() > 0, None])
    assert len(seen(Features(), features)) == 1


def test_a_wrapper_takes_what_the_module_inside_takes() -> None:
    model = Handing(Handing(Net()))
    calls()
    tw.prune_model(model, "wanda", calibration_data=[(x(), torch.arange(4)), {"x": x(2), "y": 1}], inplace=True)
    assert same(calls(), [x(), x(2)])


def test_what_takes_everything_is_given_everything() -> None:
    class Anything(Net):
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            CALLS.put((len(args), sorted(kwargs)))
            return self.fc(args[0] if args else kwargs["x"])

    assert seen(Anything(), [(x(), 1, 2), {"x": x(), "label": 3}]) == [(3, []), (0, ["label", "x"])]


def test_packed_sequences_are_one_argument() -> None:
    class Reading(Net):
        def forward(self, x: nn.utils.rnn.PackedSequence) -> torch.Tensor:
            return super().forward(x.data)

    packed = nn.utils.rnn.pack_sequence([x(3), x(2)])
    assert same(seen(Reading(), [packed]), [packed.data])


@pytest.mark.parametrize("label", [torch.arange(4), torch.tensor(3), 3])
def test_a_label_is_no_mask_and_no_switch(label: Any) -> None:
    class Masked(Net):
        def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, causal: bool = False) -> torch.Tensor:
            CALLS.put(attn_mask)
            return self.fc(x)

    class Switched(Net):
        def forward(self, x: torch.Tensor, output_hidden_states: bool | None = None) -> torch.Tensor:
            CALLS.put(output_hidden_states)
            return self.fc(x)

    class Counted(Net):
        def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
            CALLS.put(lengths)
            return self.fc(x)

    for kind in (Masked, Switched):
        assert seen(kind(), [(x(), label), [x(), label, "name"]]) == [None, None]
    assert seen(Masked(), [(x(), x() > 0)])[0] is not None and seen(Switched(), [(x(), True)]) == [True]
    (passed,) = seen(Counted(), [(x(), label)])
    assert torch.equal(torch.as_tensor(passed), torch.as_tensor(label))


# ---- functions of the user's
def tokenized(sentence: str) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[ord(letter) - 97 for letter in sentence]]), "length": torch.tensor(3)}


def test_transform_makes_inputs_of_sentences() -> None:
    found = seen(Texts(), ["abc", "bc"], transform=tokenized)
    assert [each[0].tolist() for each in found] == [[[0, 1, 2]], [[1, 2]]]
    found = seen(Features(), ["abc"], transform=lambda text: {**tokenized(text), "attention_mask": ids()})
    assert found[0][0].tolist() == [[0, 1, 2]]


def test_transform_is_given_each_row_and_a_mapping_by_itself() -> None:
    assert same(seen(Net(), x(3), transform=lambda row: row[None]), [*x(3).split(1)])
    assert same(seen(Net(), {"a": x()}, transform=lambda item: item["a"]), [x()])
    assert same(seen(Net(), [{"a": {"b": x()}}], transform=lambda item: (item["a"]["b"], 1)), [x()])


def test_forward_fn_runs_the_model() -> None:
    def forward_fn(model: nn.Module, item: Any) -> None:
        for part in item["parts"]:
            model(part)

    assert same(seen(Net(), [{"parts": [x(1), x(2)]}], forward_fn=forward_fn), [x(1), x(2)])
    data = ["abc"]
    found = seen(Texts(), data, transform=tokenized, forward_fn=lambda model, item: model(item["input_ids"], ids() > 0))
    assert found[0][1] is not None


def test_forward_fn_serves_convolutions_and_timing_too() -> None:
    model, batches = settled(SmallResNet()), [{"image": torch.randn(2, 1, 16, 16)} for _ in range(2)]
    forward_fn = lambda model, item: model(item["image"])  # noqa: E731
    plain = tw.convert_model(model, "int8", calibration_data=[item["image"] for item in batches])
    converted = tw.convert_model(model, "int8", calibration_data=batches, forward_fn=forward_fn)
    assert converted.conv1.x_scale == plain.conv1.x_scale > 0
    timed = tw.convert_model(
        model,
        "int8",
        calibration_data=iter(batches),
        forward_fn=forward_fn,
        example_inputs=batches,
        keep_if_faster=True,
    )
    assert timed(batches[0]["image"]).shape == (2, 10)


def test_the_other_functions_take_them_too() -> None:
    model, data = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval(), ["a", "b"]
    options = {"transform": lambda letter: (x(ord(letter)), letter)}
    pruned = tw.prune_model(model, "wanda", calibration_data=data, **options)
    expected = tw.prune_model(model, "wanda", calibration_data=[x(97), x(98)])
    assert torch.equal(pruned[0].weight, expected[0].weight)
    found = tw.search_pruning(model, iter(data), 0.5, **options)
    assert found == tw.search_pruning(model, [x(97), x(98)], 0.5)
    converted = tw.convert_model(model, "int8")
    report = tw.report(converted, data, model, **options)
    assert report.layers == tw.report(converted, [x(97), x(98)], model).layers
    again = tw.report(converted, data, model, forward_fn=lambda model, letter: model(x(ord(letter))))
    assert again.layers == report.layers


def test_a_generator_is_kept_where_it_is_needed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    trials: list[nn.Module] = []

    def compare(old: nn.Module, new: nn.Module, examples: list[Any]) -> timing.Times:
        trials.append(new)
        return timing.Times(2.0, 1.0, 0)

    monkeypatch.setattr(timing, "compare_models", compare)
    model = settled(SmallResNet())
    images = [torch.randn(2, 1, 16, 16) for _ in range(3)]
    converted = tw.convert_model(
        model,
        tw.Int8Static(observer="minmax", symmetric=True),
        calibration_data=(each for each in images),
        example_inputs=images[0],
        keep_if_faster=True,
    )
    (trial,) = trials
    largest = max(float(each.abs().max()) for each in images)
    assert trial.conv1.x_scale == converted.conv1.x_scale == pytest.approx(largest / 127)


# ---- what is said
MASK = torch.zeros(2, 4).masked_fill(torch.ones(2, 4).triu(1) > 0, -torch.inf)


@pytest.mark.parametrize(
    "data, said",
    [
        ([x(), x() * torch.nan], "calibration_data, item 1, argument 'x': 256 of 256 values are NaN"),
        (
            [{"x": x().masked_fill(x() > 2, torch.inf)}],
            r"calibration_data, item 0, argument 'x': \d+ of 256 values are Inf",
        ),
        ([x().masked_fill(x() > 2, -torch.inf)], r"argument 'x': \d+ of 256 values are -Inf"),
        ([(x().double().numpy() * np.nan,)], "item 0, argument 'x': 256 of 256 values are NaN"),
        ([torch.empty(0, 64)], r"argument 'x': a tensor of shape \[0, 64\] holds nothing"),
    ],
)
def test_what_is_no_number_is_named(data: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tw.convert_model(Net(), "int8", calibration_data=data)


def test_what_is_no_number_is_named_within_an_argument_and_through_forward_fn() -> None:
    with pytest.raises(ValueError, match=r"calibration_data, item 0, argument \"features\['input_ids'\]\": 1 of 2"):
        tw.convert_model(Features(), "int8", calibration_data=[{"input_ids": torch.tensor([torch.nan, 1.0])}])
    data = [x(), x() * torch.nan]
    with pytest.raises(ValueError, match=r"^calibration_data, item 1, argument 'x': 256 of 256 values are NaN$"):
        tw.convert_model(Net(), "int8", calibration_data=data, forward_fn=lambda model, item: model(item))


def test_masks_may_be_infinite_and_labels_anything() -> None:
    assert same([*seen(Texts(), [{"input_ids": ids(), "attention_mask": MASK}])[0]], [ids(), MASK, None])
    assert same(seen(Net(), [(x(), torch.tensor(torch.nan))]), [x()])


def test_what_is_left_out_is_written_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="tilewright")
    seen(Net(), [(x(), 1), (x(), 2)])
    seen(Net(), [{"x": x(), "label": 1}])
    said = [message for message in caplog.messages if "no place" in message]
    assert said == [
        "calibration_data: Net.forward(x) has no place for value 2 of 2 of an item",
        "calibration_data: Net.forward(x) has no place for 'label' of an item",
    ]


# ---- training mode
def test_a_model_in_training_mode_is_told_once_and_left_in_it(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 64))
    converted = tw.convert_model(model, "int8", calibration_data=[x()], example_inputs=x(), keep_if_faster=True)
    assert caplog.messages.count("Sequential is in training mode: call model.eval() before inference") == 1
    assert converted.training and converted[1].training
    made = tw.report(converted)
    assert made.training and made.to_json()["training"]
    assert "in training mode: model.eval() comes before inference" in made.headlines()
    made = tw.report(converted.eval())
    assert not made.training and not any("training" in line for line in made.headlines())


def test_calibration_in_training_mode_is_that_of_eval_mode() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64))

    found = [tw.convert_model(made, "int8", calibration_data=[x(50)]) for made in (model().train(), model().eval())]
    first, second = (made.eval()(x()) for made in found)
    assert torch.equal(first, second)


def test_a_new_layer_in_a_model_in_eval_mode_is_no_training(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    model.append(nn.Linear(64, 64))
    assert not tw.report(tw.convert_model(model, "int8")).training and "training" not in caplog.text
    model.append(nn.Dropout())
    assert tw.report(tw.convert_model(model, "int8")).training and "training" in caplog.text
