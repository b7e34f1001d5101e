"""The committed table of compiled kernels: what it must show, and that it is what compiling gives."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: it publishes wheels for Linux alone")

import triton

from bench.catalogue import Entry
from bench.tables.compiled import (
    BUDGETS,
    TABLE,
    WORSE,
    Row,
    compute,
    differences,
    entries,
    main,
    read_table,
    sample,
    write_table,
)
from tilewright.aot.targets import TARGETS, Target

pytestmark = pytest.mark.aot
ROOT = Path(__file__).parents[2]
ROWS = list(read_table().values())
SAMPLE = 12
LARGE_SAMPLE = 176
#: Kernels that multiply nothing: they quantise rows, or add up the parts of a product.
WITHOUT_PRODUCT = (
    "quantize_per_row_kernel",
    "norm_quantize_kernel",
    "reduce_parts_kernel",
    "sum_parts_kernel",
    "dequantize_kernel",
    "widen_kernel",
    "depthwise_kernel",
    "quantize_per_tensor_kernel",
)
#: Families that multiply floats.
FLOAT = ("int4_linear", "int8_weight_only_linear", "sparse24_linear", "sparse24_int4_linear")
#: Triton has no tcgen05 for int8 operands.
MATRIX_INSTRUCTION = {
    "int8": {"sm_80": "mma.sync", "sm_89": "mma.sync", "sm_90": "wgmma", "sm_100": "mma.sync", "gfx942": "mfma"},
    "float": {"sm_80": "mma.sync", "sm_89": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"},
}


def in_words(rows: list[Row]) -> str:
    return "\n".join(str(row) for row in rows)


def test_every_kernel_of_the_catalogue_has_its_row() -> None:
    required = {(*entry.key, target.name) for target, entry in entries()}
    assert {row.key for row in ROWS} == required, "the catalogue has changed: `make compiled` makes the table anew"


def test_every_kernel_that_is_launched_is_in_the_table() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tilewright" / "kernels").rglob("*.py"))
    made = re.findall(r"@triton\.jit\b[^\n]*\ndef (\w+_kernel)\b", text) + re.findall(r"^(\w+_kernel) = ", text, re.M)
    # "kernel" is a parameter, of a plan that several of those above have in common.
    launched = {*made, *re.findall(r"\bLaunch\(\s*(\w+)", text)} - {"kernel"}
    assert {"int4_linear_kernel", "int4_int8_linear_kernel", "swapped_kernel", "tile_kernel"} <= launched
    assert len(launched) > 10
    missing = sorted(launched - {row.kernel for row in ROWS})
    assert not missing, f"bench.catalogue does not know {missing}, so they are neither in the table nor emulated"


def test_no_kernel_breaks_a_limit_of_its_target() -> None:
    over = [row for row in ROWS if row.shared > TARGETS[row.target].shared_bytes]
    over += [row for row in ROWS if row.registers > TARGETS[row.target].registers]
    assert not over, in_words(over)


def test_no_kernel_spills_where_loads_are_aligned() -> None:
    spilling = [row for row in ROWS if row.spills and "ragged" not in row.variant]
    assert not spilling, in_words(spilling)


def test_ragged_rows_spill_in_the_known_families_alone() -> None:
    """A K that is no multiple of 16 makes int8 loads of single bytes, whose pointers and masks fill the registers."""
    spilling = {row.family for row in ROWS if row.spills}
    known = {"int8_linear swapped", "int8_linear tile", "int8_weight_only_linear swapped"}
    assert spilling <= known | {"sparse24_linear unpacked", "sparse24_int4_linear unpacked"}


def test_products_use_the_matrix_instruction_of_their_target() -> None:
    wrong = []
    for row in ROWS:
        if row.kernel in WITHOUT_PRODUCT:
            continue
        # The convolutions' families serve both; their variant says which.
        is_float = row.family.startswith(FLOAT) or (
            row.family.startswith("conv2d") and not row.variant.startswith(("int8", "uint8"))
        )
        # IEEE float32 products have no matrix instruction on NVIDIA.
        ieee = is_float and row.variant.startswith("fp32") and row.target != "gfx942"
        kind = "float" if is_float else "int8"
        if row.family.endswith("mma.sync"):
            wrong += [row] if row.matrix != "mma.sync" else []
        elif row.family.endswith("mma.sp"):
            machine_code = "IMMA.SP" if "int8" in row.family else "HMMA.SP"
            wrong += [row] if row.matrix != f"mma.sp {machine_code}" else []
        elif row.matrix != ("" if ieee else MATRIX_INSTRUCTION[kind][row.target]):
            wrong.append(row)
    assert not wrong, in_words(wrong)


def test_products_and_quantisers_load_16_bytes_at_a_time() -> None:
    # These write as much as they read or more, and a block of 64-wide warps has fewer than 16 bytes for each thread.
    others = ("reduce_parts_kernel", "sum_parts_kernel", "dequantize_kernel", "widen_kernel")
    # Three channels lie apart, and 24 of int8 are a multiple of 8 bytes.
    narrow = [row for row in ROWS if not row.loads_16 and "ragged" not in row.variant and row.kernel not in others]
    narrow = [row for row in narrow if row.kernel != "stem_kernel" and row.variant != "int8 24 channels"]
    assert not narrow, in_words(narrow)


def test_a_sample_is_no_worse_than_the_table_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    check_against_table(sample(entries(), SAMPLE))


@pytest.mark.slow
def test_a_large_sample_is_no_worse_than_the_table_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of the table; ``python -m bench.tables.compiled --check`` takes all of it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    check_against_table(sample(entries(), LARGE_SAMPLE))


def check_against_table(chosen: Sequence[tuple[Target, Entry]]) -> None:
    """Under the table's Triton nothing may differ: what became better is written down too, or it could rot unseen.

    Under another Triton everything must compile, and figures are left open.
    """
    rows = [compute(target, entry) for target, entry in chosen]
    made_by = {row.triton for row in ROWS}
    if made_by != {triton.__version__}:
        pytest.skip(f"all compiled; {TABLE.name} is of Triton {', '.join(made_by)} and this is {triton.__version__}")
    changed = differences(read_table(), rows, whole=False)
    worse = [line for line in changed if WORSE in line]
    assert not worse, "\n".join(["worse than the table says:", *worse])
    assert not changed, "\n".join(["`make compiled` writes down what became better:", *changed])


A_ROW = Row("family", "kernel", "bf16", "block=1", "sm_90", 40, 0, 1024, "wgmma", 4, 8, 8, "3.7.1")


def test_differences_name_the_row_and_the_figure() -> None:
    worse = dataclasses.replace(A_ROW, registers=48, spills=8)
    assert differences({A_ROW.key: A_ROW}, [A_ROW], whole=True) == []
    assert differences({A_ROW.key: A_ROW}, [worse], whole=True) == [
        "family | kernel | bf16 | block=1 | sm_90: registers 40 -> 48 (worse), spills 0 -> 8 (worse)"
    ]
    assert differences({}, [A_ROW], whole=True) == ["family | kernel | bf16 | block=1 | sm_90: new"]
    assert differences({A_ROW.key: A_ROW}, [], whole=True) == ["family | kernel | bf16 | block=1 | sm_90: gone"]
    assert differences({A_ROW.key: A_ROW}, [], whole=False) == []


@pytest.mark.parametrize("name", BUDGETS)
def test_a_figure_that_grows_is_worse(name: str) -> None:
    row = dataclasses.replace(A_ROW, **dict.fromkeys(BUDGETS, 2))
    assert row.worse(dataclasses.replace(row, **{name: 3})) == [name]
    assert row.worse(dataclasses.replace(row, **{name: 1})) == []


def test_what_is_gone_is_worse() -> None:
    counted = dataclasses.replace(A_ROW, read_excess=1.0)
    assert counted.worse(A_ROW) == ["read_excess"] and A_ROW.worse(counted) == []
    assert A_ROW.worse(dataclasses.replace(A_ROW, matrix="", loads_16=0)) == ["matrix", "loads_16"]


def test_a_budget_that_is_broken_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above, against a table that allows one register less, and one that allows one more."""
    chosen = sample(entries(), 1)
    (key,) = [(*entry.key, target.name) for target, entry in chosen]
    row = read_table()[key]
    if row.triton != triton.__version__:
        pytest.skip(f"{TABLE.name} is of Triton {row.triton}")
    for change, words in ((-1, "worse than the table says:"), (1, "what became better:")):
        table = {key: dataclasses.replace(row, registers=row.registers + change)}
        monkeypatch.setattr(sys.modules[__name__], "read_table", lambda table=table: table)
        with pytest.raises(AssertionError, match=rf"{words}\n.*registers {row.registers + change} -> {row.registers}"):
            check_against_table(chosen)


def test_a_table_reads_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_table([A_ROW], path)
    assert read_table(path) == {A_ROW.key: A_ROW}
    assert read_table(tmp_path / "none.csv") == {}


def test_samples_are_spread_and_no_larger_than_the_whole() -> None:
    assert sample(list(range(10)), 5) == [0, 2, 4, 6, 8]
    assert sample(list(range(3)), 5) == [0, 1, 2]


def test_checking_leaves_the_table_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = TABLE.read_bytes()
    main(["--sample", "1"])
    assert TABLE.read_bytes() == before
    assert "1 rows compiled" in capsys.readouterr().out
