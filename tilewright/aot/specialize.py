"""What Triton's launcher reads out of the arguments of a launch before it compiles, read here without a GPU.

A kernel is compiled once for each *specialisation* of its arguments: pointers and integers divisible by 16 are
promised to be so, an integer 1 and an absent pointer become constants. Code compiled without these promises is not the
code that runs: 16-byte loads need them. So the rules are not written down again here: Triton's own binder is asked, for
the target's backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from tilewright.aot.launch import Launch
from tilewright.aot.targets import Target


@dataclass(frozen=True)
class Specialization:
    """The arguments of ``triton.compiler.ASTSource`` for one launch, keyed by parameter name and position.

    signature: type of each parameter, "constexpr" where its value is compiled in. constants: those values. attributes:
    promises such as ``[["tt.divisibility", 16]]``.
    """

    signature: dict[str, str]
    constants: dict[tuple[int], Any] = field(default_factory=dict)
    attributes: dict[tuple[int], list[list[Any]]] = field(default_factory=dict)

    @property
    def run_time(self) -> tuple[str, ...]:
        """Parameters that the compiled kernel takes."""
        return tuple(name for name, kind in self.signature.items() if kind != "constexpr")

    def divisible(self) -> frozenset[str]:
        """Parameters that are promised to be divisible by 16."""
        names = tuple(self.signature)
        return frozenset(
            names[place] for (place,), promises in self.attributes.items() if ["tt.divisibility", 16] in promises
        )


class _Pointer:
    """Stands for a tensor towards Triton's binder, which asks a tensor for its dtype, address and extent only.

    A tensor that is not on a GPU stands for one that will be: allocators there align at least to 256 bytes, so its
    address modulo 16 is that of its storage offset.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype
        self.tensor = tensor

    def data_ptr(self) -> int:
        if self.tensor.device.type == "cuda" and not isinstance(self.tensor, torch._subclasses.FakeTensor):
            return self.tensor.data_ptr()
        return int(self.tensor.storage_offset()) * self.tensor.element_size()

    def ptr_range(self) -> int:
        return self.tensor.untyped_storage().size()


def parse_signature(
    kernel: Any, signature: Mapping[str, str], constants: Mapping[str, Any], target: Target
) -> Specialization:
    """The specialisation that types and constants written by hand describe; see ``compiler.compile``.

    Raises TypeError as ``specialize`` does, and ValueError for parameters that are missing, unknown or named twice, and
    for a promise other than ":16".
    """
    _check_kernel(kernel)
    names = list(kernel.arg_names)
    signature = {name: kind for name, kind in signature.items() if kind != "constexpr" or name not in names}
    defaults = {p.name: p.default for p in kernel.params if p.has_default and p.name not in signature}
    unknown = sorted({*signature, *constants} - set(names))
    twice = sorted(set(signature) & set(constants))
    constants = {**defaults, **constants}
    missing = [name for name in names if name not in signature and name not in constants]
    if unknown or missing or twice:
        raise ValueError(
            f"kernel {kernel.__name__}: unknown parameters {unknown}, missing {missing}, typed and constant {twice}"
        )
    kinds, attributes = {}, {}
    for place, name in enumerate(names):
        kind, _, promise = signature.get(name, "constexpr").partition(":")
        if promise not in ("", "16"):
            raise ValueError(f"{name}: {signature[name]!r} promises {promise!r}; only ':16' can be promised")
        kinds[name] = kind
        if promise:
            attributes[(place,)] = backend_of(target).parse_attr("D")
    return Specialization(kinds, {(names.index(name),): value for name, value in constants.items()}, attributes)


#: Tensors of other dtypes are taken on trust: kernels are given bytes for them.
_POINTER_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def pointer_type(value: Any) -> str | None:
    """Triton's type of a tensor whose elements are wider than a byte, or None."""
    return _POINTER_TYPES.get(value.dtype) if isinstance(value, torch.Tensor) else None


def backend_of(target: Target) -> BaseBackend:
    """Triton's compiler backend for ``target``."""
    return make_backend(GPUTarget(target.backend, target.arch, target.warp_size))


def specialize(launch: Launch, target: Target) -> Specialization:
    """The specialisation that launching ``launch`` on ``target`` would compile.

    Raises TypeError if the kernel is not a ``triton.jit`` function (it is something else under TRITON_INTERPRET=1), and
    ValueError naming the parameters that were not given, or given without being parameters.
    """
    kernel = launch.kernel
    _check_kernel(kernel)
    given = {**launch.args, **launch.constants}
    unknown = sorted(set(given) - set(kernel.arg_names))
    missing = [p.name for p in kernel.params if p.name not in given and not p.has_default]
    if unknown or missing:
        raise ValueError(f"kernel {kernel.__name__}: unknown arguments {unknown}, missing arguments {missing}")
    backend = backend_of(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    stand_ins = {name: _Pointer(value) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    values, found, _ = bind(**stand_ins)
    kinds = dict(zip(values, (kind for kind, _ in found), strict=True))
    promises = [promise for _, promise in found]
    return Specialization(
        signature=kinds,
        constants={(i,): value for i, (name, value) in enumerate(values.items()) if kinds[name] == "constexpr"},
        attributes={
            (i,): backend.parse_attr(promise)
            for i, (kind, promise) in enumerate(zip(kinds.values(), promises, strict=True))
            if kind != "constexpr" and isinstance(promise, str)
        },
    )


def _check_kernel(kernel: Any) -> None:
    if not isinstance(kernel, JITFunction):
        raise TypeError(f"a @triton.jit function is needed, not {type(kernel).__name__} (is TRITON_INTERPRET set?)")
