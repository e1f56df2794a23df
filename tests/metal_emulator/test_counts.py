"""Count mode on MLX's kernels: figures that do not depend on the compiler, worked out by hand."""

import mlx.core as mx
import pytest

from metal_emulator import Device
from metal_emulator.mlx_attention import attention, blocks, sdpa_vector
from metal_emulator.mlx_products import Weights, qmv, qmv_wide, quantized_matmul, vector_limit
from metal_emulator.mlx_source import Chip, How
from metal_emulator.op_mix import dynamic_mix, static_mix

COUNT = How("count")
WEIGHTS = ("w", "scales", "biases")


def weights(rows: int, columns: int) -> Weights:
    return Weights(
        *mx.quantize(mx.random.normal((rows, columns)).astype(mx.float16), group_size=64, bits=4),
        64,
        4,
    )


def test_qmv_reads_its_weights_once() -> None:
    """4096 x 4096 at 4 bits: 8 MiB of packs, 1 MiB of scales and biases, 8 KiB of x, 8 KiB of y."""
    (launch,) = qmv(COUNT, mx.zeros((1, 4096), mx.float16), weights(4096, 4096)).launches
    counts = launch.counts
    assert counts
    assert counts.reads().unique_lines == 73_794  # 73,792 and the two scalars' lines
    assert counts.reads(WEIGHTS).unique_bytes == counts.reads(WEIGHTS).group_bytes == 9 * 2**20
    assert counts.writes().unique_bytes == 8192
    assert counts.simd_operations == 4096
    assert counts.threadgroup_barriers == counts.threadgroup_bytes == 0
    assert counts.mean_active_lanes > 30
    assert counts.reads().group_lines == pytest.approx(107_520, abs=1024)


def test_rows_read_the_weights_again() -> None:
    packed = weights(64, 512)
    once, four, wide = (
        (kind(COUNT, mx.zeros((rows, 512), mx.float16), packed).launches[0].counts)
        for kind, rows in ((qmv, 1), (qmv, 4), (qmv_wide, 4))
    )
    assert once and four and wide
    assert four.reads(WEIGHTS).group_lines == 4 * once.reads(WEIGHTS).group_lines
    assert four.reads(WEIGHTS).unique_lines == once.reads(WEIGHTS).unique_lines
    assert wide.reads(WEIGHTS).group_lines == once.reads(WEIGHTS).group_lines


def test_each_query_head_of_a_group_reads_the_keys_again() -> None:
    q, k, v = (mx.zeros((1, h, n, 128), mx.float16) for h, n in ((32, 1), (8, 1024), (8, 1024)))
    (launch,) = sdpa_vector(COUNT, q, k, v, 1.0).launches
    assert launch.counts
    stored = launch.counts.reads(("keys", "values"))
    assert stored.unique_bytes == 2 * 8 * 1024 * 128 * 2
    assert stored.group_lines == 4 * stored.unique_lines


@pytest.mark.parametrize(("chip", "rows", "names"), [
    (Chip(13, "g"), 1, ["affine_qmv_fast"]),
    (Chip(13, "g"), 8, ["affine_qmv_fast"]),
    (Chip(15, "g"), 8, ["affine_qmv_wide"]),
    (Chip(13, "g"), 16, ["affine_qmm_t_splitk", "col_reduce_sum"]),
])  # fmt: skip
def test_the_kernels_that_mlx_chooses(chip: Chip, rows: int, names: list[str]) -> None:
    result = quantized_matmul(COUNT, mx.zeros((rows, 512), mx.float16), weights(64, 512), chip)
    assert [launch.name for launch in result.launches] == names
    assert all(launch.counts for launch in result.launches)


@pytest.mark.parametrize(
    ("chip", "k", "n", "limit"),
    [
        (Chip(13, "g"), 2048, 2048, 14),
        (Chip(13, "g"), 4096, 2048, 10),
        (Chip(14, "g"), 2048, 8192, 6),
        (Chip(16, "s"), 2048, 2048, 13),
        (Chip(17, "g"), 4096, 4096, 25),
        (Chip(15, "d"), 2048, 2048, 32),
    ],
)
def test_rows_from_which_mlx_multiplies_matrices(chip: Chip, k: int, n: int, limit: int) -> None:
    assert vector_limit(k, n, chip) == limit


@pytest.mark.parametrize(
    ("size", "h", "stored", "parts"),
    [("g", 32, 4096, 64), ("g", 8, 4096, 32), ("s", 64, 9000, 256), ("d", 8, 9000, 256)],
)
def test_parts_of_the_keys(size: str, h: int, stored: int, parts: int) -> None:
    q, k = mx.zeros((1, h, 1, 64)), mx.zeros((1, 8, stored, 64))
    assert blocks(q, k, size) == parts


def test_attention_takes_two_passes_where_mlx_does() -> None:
    q, k = mx.zeros((1, 2, 1, 64), mx.float16), mx.zeros((1, 1, 1024, 64), mx.float16)
    names = [
        [launch.name for launch in attention(How("fast"), q, k, k, 1.0, Chip(13, size)).launches]
        for size in "gs"
    ]
    assert names == [["sdpa_vector"], ["sdpa_vector_2pass_1", "sdpa_vector_2pass_2"]]


def test_counts_of_a_launch_by_hand() -> None:
    device = Device("count")
    source = (
        "threadgroup float s[64]; uint i = thread_position_in_grid.x; uint l = thread_index_in_threadgroup;"
        "s[l] = x[i]; threadgroup_barrier(mem_flags::mem_threadgroup);"
        "float a = simd_sum(s[63 - l]); y[i] = a * 2.0f + 1.0f;"
    )
    kernel = device.metal_kernel("k", ["x"], ["y"], source)
    kernel(
        inputs=[mx.arange(256.0)],
        output_shapes=[(256,)],
        output_dtypes=[mx.float32],
        grid=(256, 1, 1),
        threadgroup=(64, 1, 1),
    )
    counts = device.launches[0].counts
    assert counts
    assert (counts.threads, counts.threadgroups, counts.simdgroups) == (256, 4, 8)
    assert (counts.simd_operations, counts.threadgroup_barriers, counts.threadgroup_bytes) == (
        8,
        4,
        256,
    )
    x, y = counts.buffers["x"], counts.buffers["y"]
    assert (x.size_bytes, x.reads.bytes_asked, x.reads.unique_lines, x.reads.group_lines) == (
        1024,
        1024,
        8,
        8,
    )
    assert (x.reads.instructions, x.reads.lines, y.writes.unique_bytes) == (8, 8, 1024)
    assert (counts.threadgroup_loads, counts.threadgroup_stores, counts.bank_cycles) == (8, 8, 16)
    assert counts.mean_active_lanes == 32
    assert counts.op_mix["fmul"] >= 256
    places = {(i.kind, i.place) for i in counts.instructions}
    assert ("device read", "k.metal:6") in places
    table = counts.table()
    assert "threadgroups 4" in table
    assert "fmul" in table


MODULE = """
@__sancov_gen_ = private global [2 x i32] zeroinitializer
@__sancov_gen_.1 = private global [3 x i32] zeroinitializer
define void @outlined() comdat {
  call void @__sanitizer_cov_trace_pc_guard(ptr @__sancov_gen_)
  %1 = fadd float %0, %0
  ret void
}
define void @kernel(ptr %x) comdat !dbg !7 {
  call void @__sanitizer_cov_trace_pc_guard(ptr @__sancov_gen_.1) #9, !dbg !9
  %1 = load float, ptr %x, align 4
  br label %a
a:                                                ; preds = %0
  call void @__sanitizer_cov_trace_pc_guard(ptr getelementptr inbounds ([3 x i32], ptr @__sancov_gen_.1, i64 0, i64 1))
  %2 = fmul contract <4 x float> %v, %v
  %3 = tail call noundef float @llvm.fma.f32(float %1, float %1, float %1)
  %4 = tail call <4 x float> @llvm.fma.v4f32(<4 x float> %v, <4 x float> %v, <4 x float> %v)
  %5 = call noundef float @exp2f(float %3)
  br label %b
b:
call @__sanitizer_cov_trace_pc_guard(ptr inttoptr (i64 add (i64 ptrtoint (ptr @__sancov_gen_.1 to i64), i64 8) to ptr))
  store float %5, ptr %x, align 4
  %6 = call i32 @llvm.umin.i32(i32 %i, i32 3)
  %7 = zext i32 %6 to i64
  call void @emu_barrier(i32 6, i32 1, i32 2)
  ret void
}
"""


def test_operations_are_booked_under_their_block() -> None:
    blocks = static_mix(MODULE)
    assert blocks == [
        {},
        {},
        {"load": 1},
        {"fmul": 4, "fma": 5, "exp2": 1},
        {"store": 1, "umin": 1},
    ]
    assert dynamic_mix(blocks, [9, 9, 1, 10, 2]) == {
        "fma": 50,
        "fmul": 40,
        "exp2": 10,
        "store": 2,
        "umin": 2,
        "load": 1,
    }
