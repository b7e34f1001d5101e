"""Kernels compiled for chips that are not here."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it publishes wheels for Linux alone")

import triton
from triton import language as tl
from triton.backends.compiler import GPUTarget

from tests.aot.small_kernels import copy_kernel, product_kernel, scale_kernel, share_kernel
from tilewright import aot
from tilewright.aot import compiler
from tilewright.aot.compiler import compile_launch
from tilewright.aot.launch import Launch
from tilewright.aot.targets import TARGETS, find_target

pytestmark = pytest.mark.aot
MATRIX_INSTRUCTION = {"sm_80": "mma.sync", "sm_89": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}


@pytest.fixture(autouse=True)
def no_kernel_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compile anew, whatever was compiled before."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def product_launch(dtype: torch.dtype = torch.float16, block: int = 64, num_stages: int = 3) -> Launch:
    a = torch.empty(block, 4096, dtype=dtype, device="meta")
    c = torch.empty(block, block, dtype=torch.int32 if dtype == torch.int8 else torch.float32, device="meta")
    constants = {"BLOCK": block, "BLOCK_K": 64, "SUM": tl.int32 if dtype == torch.int8 else tl.float32}
    return Launch(
        product_kernel, (1,), {"a_ptr": a, "b_ptr": a, "c_ptr": c, "K": 4096}, constants, block // 16, num_stages
    )


def copy_launch(count: int, offset: int = 0) -> Launch:
    source = torch.empty(4096, device="meta")[offset:]
    args = {"source_ptr": source, "target_ptr": source, "count": count, "stride": 1}
    return Launch(copy_kernel, (4,), args, {"BLOCK": 1024})


@pytest.mark.parametrize("target", TARGETS)
def test_a_product_uses_the_matrix_instruction_of_each_target(target: str) -> None:
    compiled = compile_launch(product_launch(), target)
    assert compiled.instructions.matrix.get(MATRIX_INSTRUCTION[target], 0) > 0
    assert compiled.instructions.loads.get(16, 0) > 0
    assert 0 < compiled.registers <= compiled.target.registers
    assert compiled.shared_bytes >= 2 * 64 * 64 * 2
    assert compiled.spill_bytes == 0 and compiled.over_limits == []
    assert compiled.triton_version == triton.__version__
    assert compiled.num_warps == 4


def test_loads_of_a_pipelined_product_are_asynchronous() -> None:
    pipelined = compile_launch(product_launch(num_stages=3), "sm_80")
    assert pipelined.instructions.async_copies >= 4
    assert compile_launch(product_launch(num_stages=1), "sm_80").instructions.async_copies == 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "launch, width",
    [(copy_launch(4096), 16), (copy_launch(4095), 4), (copy_launch(4096, offset=1), 4)],
    ids=["aligned", "ragged count", "misaligned pointer"],
)
def test_promises_of_alignment_reach_the_code(launch: Launch, width: int, target: str) -> None:
    assert set(compile_launch(launch, target).instructions.loads) == {width}


def test_too_much_shared_memory_is_said_in_words() -> None:
    compiled = compile_launch(product_launch(block=128, num_stages=5), "sm_89")
    assert compiled.shared_bytes > 99 * 1024
    assert compiled.over_limits == [f"{compiled.shared_bytes} bytes of shared memory, sm_89 has 101376"]


@pytest.mark.parametrize("target, size", [("sm_80", 8192), ("gfx942", 32768)])
def test_spills_are_counted(target: str, size: int) -> None:
    source = torch.empty(size, device="meta")
    launch = Launch(share_kernel, (1,), {"source_ptr": source, "target_ptr": source}, {"SIZE": size}, num_warps=1)
    compiled = compile_launch(launch, target)
    assert compiled.spill_bytes > 0
    assert target == "gfx942" or compiled.sass.local > 0


@pytest.mark.parametrize(
    "target, dtype, opcode",
    [
        ("sm_80", torch.float16, "HMMA.16816.F32"),
        ("sm_89", torch.int8, "IMMA.16832.S8.S8.SAT"),
        ("sm_90", torch.bfloat16, "HGMMA.64x64x16.F32.BF16"),
        ("sm_100", torch.float16, "UTCHMMA"),
    ],
)
def test_the_machine_code_has_what_the_ptx_asks_for(target: str, dtype: torch.dtype, opcode: str) -> None:
    compiled = compile_launch(product_launch(dtype), target)
    assert set(compiled.sass.matrix) == {opcode}
    assert compiled.sass.loads == compiled.instructions.loads
    assert compiled.sass.instructions > 100 and compiled.sass.local == 0


def test_other_vendors_have_no_sass() -> None:
    with pytest.raises(ValueError, match="gfx942 has no SASS"):
        _ = compile_launch(copy_launch(4096), "gfx942").sass


def test_an_unknown_target_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no target is called 'sm_91'; known: sm_80, sm_89"):
        find_target("sm_91")


def test_a_missing_disassembler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiler.triton, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"cuobjdump is neither at .*nor on PATH"):
        compiler.find_cuobjdump()


COPY_TYPES = {"source_ptr": "*fp32:16", "target_ptr": "*fp32:16", "count": "i32:16"}


def test_types_by_hand_compile_to_what_a_launch_does() -> None:
    by_hand = aot.compile(copy_kernel, COPY_TYPES, {"stride": 1, "BLOCK": 1024}, aot.Config(), "sm_80")
    by_launch = compile_launch(copy_launch(4096), "sm_80")
    assert by_hand.instructions == by_launch.instructions
    assert by_hand.resources == by_launch.resources
    assert by_hand.ptx == by_launch.ptx
    without = {**COPY_TYPES, "count": "i32"}
    ragged = aot.compile(copy_kernel, without, {"stride": 1, "BLOCK": 1024}, aot.Config(), "sm_80")
    assert set(ragged.instructions.loads) == {4}


@pytest.mark.parametrize(
    "signature, constants, words",
    [
        (COPY_TYPES, {"BLOCK": 1024}, r"missing \['stride'\]"),
        ({**COPY_TYPES, "more": "i32"}, {"stride": 1, "BLOCK": 1024}, r"unknown parameters \['more'\]"),
        (COPY_TYPES, {"stride": 1, "BLOCK": 1024, "count": 7}, r"typed and constant \['count'\]"),
        ({**COPY_TYPES, "count": "i32:8"}, {"stride": 1, "BLOCK": 1024}, "only ':16' can be promised"),
        ({**COPY_TYPES, "BLOCK": "constexpr"}, {"stride": 1}, r"missing \['BLOCK'\]"),
        ({**COPY_TYPES, "BLOK": "constexpr"}, {"stride": 1, "BLOCK": 4}, r"unknown parameters \['BLOK'\]"),
    ],
)
def test_wrong_types_by_hand_are_refused(signature: dict, constants: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        aot.compile(copy_kernel, signature, constants, aot.Config(), "sm_80")


CONFIGS = {
    "config": (aot.Config(2, 3), {"SCALE": 3.0, "BLOCK": 128}),
    "mapping": ({"num_warps": 2, "num_stages": 3, "BLOCK": 128}, {"SCALE": 3.0}),
    "triton": (triton.Config({"BLOCK": 128}, num_warps=2, num_stages=3), {"SCALE": 3.0}),
    "default": ({"num_warps": 2, "num_stages": 3}, {"BLOCK": 128}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_may_be_written_in_several_ways(name: str) -> None:
    config, constants = CONFIGS[name]
    types = {"source_ptr": "*fp16", "target_ptr": "*fp16", "count": "i32", "SCALE": "constexpr", "BLOCK": "constexpr"}
    compiled = aot.compile(scale_kernel, types, constants, config, GPUTarget("cuda", 90, 32))
    assert (compiled.target.name, compiled.num_warps, compiled.num_stages) == ("sm_90", 2, 3)
    source, result = torch.randn(300).half(), torch.full((300,), torch.nan).half()
    stats = compiled.emulate(3, [source, result, 300])
    assert torch.equal(result, source * (2 if name == "default" else 3))  # SCALE is 2 unless given
    assert stats.ctas == 3


@pytest.mark.parametrize(
    "config, error, words",
    [
        ({"num_warps": 4, "BLOCK": 64}, ValueError, "BLOCK: given by the constants and by the config"),
        ({"num_warps": 4, "BLOK": 64}, ValueError, r"unknown parameters \['BLOK'\]"),
        (4, TypeError, "a config has num_warps, int 4 has not"),
        (triton.Config({}, num_ctas=2), ValueError, "num_ctas=2 cannot be compiled here"),
    ],
)
def test_wrong_configs_are_refused(config: Any, error: type[Exception], words: str) -> None:
    types = {"source_ptr": "*fp16", "target_ptr": "*fp16", "count": "i32"}
    with pytest.raises(error, match=words):
        aot.compile(scale_kernel, types, {"BLOCK": 128}, config, "sm_80")


def test_the_example_of_the_documentation_runs(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "ahead-of-time.md").read_text(encoding="utf-8")
    example = tmp_path / "example.py"  # Triton reads the source of a kernel from its file
    example.write_text(text.split("```python\n")[1].split("```")[0], encoding="utf-8")
    found = runpy.run_path(str(example))
    assert torch.equal(found["y"], 2 * found["x"])
    assert found["compiled"].over_limits == [] and found["stats"].ctas == 2


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_launch_is_emulated_with_the_arguments_that_it_would_run_with(target: str) -> None:
    source, result = torch.randn(300), torch.full((300,), torch.nan)
    args = {"source_ptr": source, "target_ptr": result, "count": 300, "stride": 1}
    launch = Launch(copy_kernel, (3,), args, {"BLOCK": 128})
    stats = aot.emulate_launch(launch, target)
    assert torch.equal(result, source)
    assert stats.ctas == 3
    assert stats.global_bytes == {"read": 1200, "written": 1200}


def test_arguments_that_break_a_promise_are_refused() -> None:
    compiled = compile_launch(copy_launch(4096), "sm_80")
    source = torch.zeros(4097)
    good = {"source_ptr": source[:-1], "target_ptr": torch.zeros(4096), "count": 4096}
    compiled.emulate((4,), {**good, "stride": 1})
    for changed, words in (
        ({"count": 4095}, "count was promised to be divisible by 16"),
        ({"source_ptr": source[1:]}, "source_ptr was promised to be divisible by 16"),
        ({"stride": 2}, "stride was compiled in as 1, not 2"),
        ({"source_ptr": source.half()}, r"source_ptr was compiled as \*fp32, and is \*fp16"),
        ({"strides": 2}, "no parameter 'strides'"),
    ):
        with pytest.raises(ValueError, match=words):
            compiled.emulate((4,), {**good, **changed})
    del good["count"]
    with pytest.raises(ValueError, match="arguments are missing: count"):
        compiled.emulate((4,), good)


@pytest.mark.parametrize("target", ["sm_89", "sm_100", "gfx942"])
def test_other_targets_cannot_be_emulated(target: str) -> None:
    launch = copy_launch(4096)
    with pytest.raises(ValueError, match=rf"{target} cannot be emulated, only sm_80, sm_90 can"):
        compile_launch(launch, target).emulate(launch.grid, launch.args)
