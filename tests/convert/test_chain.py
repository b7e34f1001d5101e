"""The walker over what follows an operator: what it takes, in which order, and where it stops."""

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from tilewright.convert.graph.chain import Chain, Match, Part, activates, added_to, follow

MODULES: dict[str, nn.Module] = {"drop": nn.Dropout(), "relu": nn.ReLU()}
ANY_NORM: Match = lambda user, end: user if user.target is F.batch_norm else None  # noqa: E731
PARTS: dict[Part, Match] = {"norm": ANY_NORM, "residual": added_to, "activation": activates(MODULES)}


def graph_of(*steps: str) -> fx.Node:
    """The start of a graph of ``steps`` after one another."""
    graph = fx.Graph()
    x, other = graph.placeholder("x"), graph.placeholder("other")
    start = end = graph.call_function(torch.neg, (x,))
    for step in steps:
        if step in MODULES:
            end = graph.call_module(step, (end,))
        else:
            arguments = {"add": (operator.add, (end, other)), "double": (operator.add, (end, end))}
            arguments |= {"norm": (F.batch_norm, (end, other, other)), "gelu": (F.gelu, (end,))}
            end = graph.call_function(*arguments[step])
    graph.output(end)
    return start


def taken(*steps: str, parts: dict[Part, Match] = PARTS) -> Chain:
    return follow(graph_of(*steps), parts, MODULES)


def test_every_part_is_taken_once_and_in_order() -> None:
    chain = taken("norm", "drop", "add", "relu", "drop", "gelu")
    assert chain.words == ("batch-norm", "add", "relu")
    assert chain.activation == ("relu", 0.0)
    assert chain.norm is not None and chain.norm.target is F.batch_norm
    assert chain.residual is not None and chain.residual.name == "other"
    assert [node.name for node in chain.nodes[-2:]] == ["relu", "drop_1"]


def test_a_part_that_comes_too_late_ends_the_chain() -> None:
    assert taken("add", "norm").words == ("add",)
    assert taken("relu", "add").words == ("relu",)


def test_the_order_is_the_callers() -> None:
    activation_first: dict[Part, Match] = {"activation": activates(MODULES), "residual": added_to}
    assert taken("gelu", "add", parts=activation_first).words == ("gelu", "add")
    assert taken("add", "gelu", parts=activation_first).words == ("add",)


def test_only_known_activations_are_taken() -> None:
    assert taken("gelu", parts={"activation": activates(MODULES, ("relu",))}).words == ()


def test_a_value_that_is_added_to_itself_is_no_residual() -> None:
    assert taken("double").residual is None


def test_nothing_is_taken_that_somebody_else_reads() -> None:
    start = graph_of("relu")
    with start.graph.inserting_after(start):
        start.graph.call_function(torch.neg, (start,))
    assert follow(start, PARTS, MODULES).nodes == (start,)


def test_without_modules_nothing_is_passed() -> None:
    assert follow(graph_of("drop", "relu"), PARTS, None).words == ()


def test_a_node_that_may_not_move_ends_the_chain() -> None:
    chain = follow(graph_of("add", "relu"), PARTS, MODULES, lambda user, nodes: user.target != "relu")
    assert chain.words == ("add",)


def test_a_chain_is_replaced_as_a_whole() -> None:
    chain = taken("add", "relu")
    graph = chain.end.graph
    with graph.inserting_before(chain.end):
        chain.replace(graph.call_function(torch.add, (chain.nodes[0].args[0], chain.residual)))
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [torch.add]
