from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

from tilewright.convert.schemes import (
    Int4WeightOnly,
    Int8ActInt4Weight,
    Int8Dynamic,
    Int8WeightOnly,
    Scheme,
    register_scheme,
    registered_schemes,
    scheme_from_json,
)
from tilewright.nn import Int4Linear, Int8ActInt4WeightLinear, Int8Linear, Int8WeightOnlyLinear

EXAMPLES = [
    Int8Dynamic(),
    Int8Dynamic(range_search="mse"),
    Int8WeightOnly(compute_dtype="float16"),
    Int4WeightOnly(group_size=None, symmetric=False, compute_dtype=None),
    Int8ActInt4Weight(group_size=32),
]


@pytest.mark.parametrize("scheme", EXAMPLES, ids=str)
def test_json_round_trip(scheme: Scheme) -> None:
    written = json.loads(json.dumps(scheme.to_json()))
    assert written["version"] == 1
    assert scheme_from_json(written) == scheme


@pytest.mark.parametrize(
    "data, message",
    [
        ({"scheme": "Int8Dynamical", "version": 1}, "'Int8Dynamical' is unknown, did you mean 'Int8Dynamic'"),
        ({"scheme": "Int8Dynamic", "version": 2}, "version 2.*reads version 1"),
        ({"scheme": "Int8Dynamic"}, "version None"),
        ({"scheme": "Int4WeightOnly", "version": 1, "groupsize": 32}, "'groupsize', did you mean 'group_size'"),
        ({"scheme": "Int4WeightOnly", "version": 1, "group_size": "32"}, "group_size must be an int"),
        ({"scheme": "Int4WeightOnly", "version": 1, "group_size": 0}, "group_size must be positive"),
        ({"scheme": "Int4WeightOnly", "version": 1, "symmetric": "no"}, "symmetric must be True or False"),
        ({"scheme": "Int8WeightOnly", "version": 1, "compute_dtype": "int8"}, "compute_dtype must be"),
        ({"scheme": "Int8Dynamic", "version": 1, "range_search": "max"}, "range search 'max' is unknown"),
        ({"version": 1}, "the key 'scheme'"),
        ("int8", "the key 'scheme'"),
    ],
)
def test_json_that_is_not_a_scheme(data: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scheme_from_json(data)


def test_schemes_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Int8Dynamic().range_search = "mse"  # type: ignore[misc]


@pytest.mark.parametrize(
    "scheme, kind",
    [
        (Int8Dynamic(), Int8Linear),
        (Int8WeightOnly(), Int8WeightOnlyLinear),
        (Int4WeightOnly(group_size=16), Int4Linear),
        (Int8ActInt4Weight(group_size=16), Int8ActInt4WeightLinear),
    ],
    ids=str,
)
def test_build_makes_the_module(scheme: Scheme, kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 24, dtype=torch.bfloat16)
    module = scheme.build(linear)
    assert type(module) is kind
    assert module.bias is linear.bias
    assert module.dtype == torch.bfloat16
    assert scheme.weight_error(linear, module) < 0.2
    if isinstance(scheme, (Int4WeightOnly, Int8ActInt4Weight)):
        assert module.group_size == 16


@pytest.mark.parametrize(
    "option, weight, expected",
    [
        ("auto", torch.float32, torch.bfloat16),
        ("auto", torch.float16, None),
        ("auto", torch.bfloat16, None),
        (None, torch.float32, None),
        ("float16", torch.float32, torch.float16),
    ],
)
@pytest.mark.parametrize("kind", [Int8WeightOnly, Int4WeightOnly])
def test_compute_dtype(kind: type, option: str | None, weight: torch.dtype, expected: torch.dtype | None) -> None:
    assert kind(compute_dtype=option).build(nn.Linear(32, 8, dtype=weight)).compute_dtype == expected


def test_one_registration_makes_a_scheme_known() -> None:
    assert set(registered_schemes()) >= {"Int8Dynamic", "Int8WeightOnly", "Int4WeightOnly", "Int8ActInt4Weight"}
    with pytest.raises(ValueError, match="Int8Dynamic is registered already"):
        register_scheme(Int8Dynamic)
