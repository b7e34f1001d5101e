"""What the code of a module's class names: as far as names tell, and without running it."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterator

from torch import nn


def is_somebodys(module: nn.Module) -> bool:
    """Whether the class of ``module`` is neither PyTorch's nor ours, so that its code may do anything."""
    return not type(module).__module__.startswith(("torch.", "tilewright."))


def names_in(code: types.CodeType) -> Iterator[str]:
    """Global and attribute names in ``code`` and in what is defined inside of it."""
    for each in _codes(code):
        yield from each.co_names


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def is_of_torch(function: types.FunctionType) -> bool:
    """Whether PyTorch has written a function."""
    return (function.__module__ or "").startswith("torch.")


def content(cell: types.CellType) -> object:
    """What a cell of a closure holds; None for nothing."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def assigns_globals(code: types.CodeType) -> bool:
    """Whether there may be a ``global`` that the code assigns to."""
    return any(dis.opmap["STORE_GLOBAL"] in each.co_code[::2] for each in _codes(code))


def functions_behind(function: object) -> Iterator[types.FunctionType]:
    """A function of Python and those that decorators wrapped in it; nothing for any other object."""
    found: set[object] = set()
    stack = [function]
    while stack:
        each = stack.pop()
        if isinstance(each, types.FunctionType) and each not in found:
            found.add(each)
            yield each
            stack += [content(cell) for cell in each.__closure__ or ()]


def methods_of(kind: type[nn.Module]) -> dict[str, types.FunctionType]:
    """``forward`` of a class and the other methods that it may call, as far as names tell; not those of PyTorch."""
    found: dict[str, types.FunctionType] = {}
    names = {"forward"}
    while names:
        name = names.pop()
        owner = next((base for base in kind.__mro__ if name in vars(base)), None)
        function = None if owner is None else vars(owner)[name]
        if isinstance(function, types.FunctionType) and not is_of_torch(function):
            found[name] = function
            names |= {other for f in functions_behind(function) for other in names_in(f.__code__)} - found.keys()
    return found


def names_in_code_of(kind: type[nn.Module]) -> set[str]:
    """Global and attribute names in ``forward`` of a class and in what it may call."""
    functions = (f for method in methods_of(kind).values() for f in functions_behind(method))
    return {name for function in functions for name in names_in(function.__code__)}


def may_write(kind: type[nn.Module], attribute: str) -> bool:
    """Whether ``forward`` of a class may assign to an attribute or write into the tensor there."""
    functions = {f for method in methods_of(kind).values() for f in functions_behind(method)}
    codes = (code for function in functions for code in _codes(function.__code__))
    return any(attribute in code.co_names and _writes(code, attribute) for code in codes)


@functools.lru_cache(maxsize=1024)
def _writes(code: types.CodeType, attribute: str) -> bool:
    """Whether code that names ``attribute`` assigns to it, or has any operator in place that could be about it."""
    if any(name.endswith("_") and not name.endswith("__") for name in code.co_names):
        return True
    if any(isinstance(constant, tuple) and "out" in constant for constant in code.co_consts):
        return True
    for step in dis.get_instructions(code):
        if step.opname == "STORE_ATTR" and step.argval == attribute:
            return True
        if step.opname in ("STORE_SUBSCR", "STORE_SLICE") or step.opname.startswith("INPLACE_"):
            return True
        if step.opname == "BINARY_OP" and step.argrepr.endswith("="):
            return True
    return False
