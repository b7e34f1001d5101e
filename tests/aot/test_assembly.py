"""Counting instructions in PTX and AMD assembly, on lines whose count is known."""

from __future__ import annotations

import pytest

from tilewright.aot.assembly import read_amd_metadata, read_amdgcn, read_ptx, read_resource_usage, read_sass


@pytest.mark.parametrize(
    "line, kind",
    [
        ("wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%r1,%r2}, {%r3}, %rd5, p, 1, 1, 0;", "wgmma"),
        ("wgmma.mma_async.sp.sync.aligned.m64n16k32.f32.f16.f16 {%r1}, %rd1, %rd2, %r4, 0, p, 1, 1;", "wgmma.sp"),
        ("@%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd2, %rd3, %r4, %p2;", "tcgen05"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %r1 }, { %r2 }, { %r3 }, { %r1 };", "mma.sync"),
        ("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%r1}, {%r2};", "mma.sp"),
    ],
)
def test_matrix_instructions(line: str, kind: str) -> None:
    assert read_ptx(f"\t{line}\n").matrix == {kind: 1}
    assert read_ptx(f"// {line}\n").matrix == {}


def test_waiting_for_a_matrix_instruction_is_not_one() -> None:
    assert (
        read_ptx("wgmma.wait_group.sync.aligned 0;\nwgmma.fence.sync.aligned;\ntcgen05.commit.cta_group::1;").matrix
        == {}
    )


@pytest.mark.parametrize(
    "line, size",
    [
        ("@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", 16),
        ("ld.global.nc.v2.b64 {%rd1, %rd2}, [%rd3];", 16),
        ("ld.global.L1::evict_last.v8.b32 {%r1}, [%rd1];", 32),
        ("ld.global.v4.u8 {%rs1}, [%rd1];", 4),
        ("ld.global.b16 { %rs1 }, [ %rd1 + 0 ];", 2),
        ("ld.relaxed.gpu.global.f32 %f1, [%rd1];", 4),
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", 16),
        ("cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2;", 4),
    ],
)
def test_widths_of_loads(line: str, size: int) -> None:
    found = read_ptx(line)
    assert found.loads == {size: 1}
    assert found.async_copies == line.startswith("cp.async")


@pytest.mark.parametrize(
    "line", ["ld.shared.v4.b32 {%r1}, [%r2];", "ld.param.b64 %rd1, [p];", "st.global.v4.b32 [%rd1], {%r1};"]
)
def test_other_memory_operations_are_no_global_loads(line: str) -> None:
    assert read_ptx(line).loads == {}


def test_amd_instructions() -> None:
    assembly = """
        global_load_dwordx4 v[2:5], v[0:1], off
        buffer_load_dwordx4 v[6:9], v10, s[4:7], 0 offen
        buffer_load_ubyte_d16_hi v11, v10, s[4:7], 0 offen
        v_mfma_i32_32x32x16_i8 a[0:15], v[0:1], v[2:3], a[0:15]
        v_mfma_f32_16x16x16_f16 v[0:3], v[4:5], v[6:7], v[0:3] ; v_mfma_f32
        global_store_dwordx4 v[0:1], v[2:5], off
    """
    found = read_amdgcn(assembly)
    assert found.matrix == {"mfma": 2}
    assert found.loads == {16: 2, 1: 1}


SASS = """
	code for sm_90a
		Function : product_kernel
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                            /* 0x00000a00ff017b82 */
                                                                                     /* 0x000e220000000800 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR14][R2.64] ;        /* 0x0000000000007919 */
        /*0020*/              @UP2 LDGSTS.E.BYPASS.LTC128B.128 [R3], desc[UR4][R6.64] ;  /* 0x00000000000c79c3 */
        /*0030*/                   LDG.E.U8 R4, desc[UR14][R2.64+0x80] ;             /* 0x00008a0000187ab9 */
        /*0040*/                   LDG.E R4, desc[UR14][R2.64] ;                     /* 0x0000040000047882 */
        /*0050*/                   LDGDEPBAR ;                                       /* 0x00000000000079af */
        /*0060*/                   HGMMA.64x64x16.F32 R24, R8, gdesc[UR4], R24 ;     /* 0x0000000000007918 */
        /*0070*/                   HMMA.16816.F32 R4, R8, R12, R4 ;                  /* 0x0000000000007918 */
        /*0080*/                   STL.64 [R1+0x8], R4 ;                             /* 0x0000000000007918 */
        /*0090*/                   NOP ;                                             /* 0x0000000000007918 */
"""


def test_machine_code() -> None:
    found = read_sass(SASS)
    assert found.instructions == 9
    assert found.matrix == {"HGMMA.64x64x16.F32": 1, "HMMA.16816.F32": 1}
    assert found.loads == {16: 2, 1: 1, 4: 1}
    assert found.local == 1
    with pytest.raises(ValueError, match="no instructions in what"):
        read_sass("cuobjdump fatal: no device code")


def test_resource_usage() -> None:
    text = "Function kernel:\n  REG:168 STACK:24 SHARED:0 LOCAL:0 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
    found = read_resource_usage(text)
    assert (found.registers, found.spill_bytes) == (168, 24)
    with pytest.raises(ValueError, match="no resource usage"):
        read_resource_usage("cuobjdump fatal: no device code")


def test_amd_metadata() -> None:
    text = "    .private_segment_fixed_size: 0\n    .vgpr_count:     84\n    .vgpr_spill_count: 2\n"
    found = read_amd_metadata(text)
    assert (found.registers, found.spill_bytes) == (84, 8)
    with pytest.raises(ValueError, match="lacks register counts"):
        read_amd_metadata(".vgpr_count: 84")
