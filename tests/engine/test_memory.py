"""The arithmetic of memory against what is reserved: pages and arrays of caches, packed matrices, weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_edge import ops
from mlx_edge.cache import KVCache, PagedKVCache, QuantizedRows, prepare_step
from mlx_edge.engine.config import EngineConfig
from mlx_edge.engine.memory.budget import MemoryBudget
from mlx_edge.engine.memory.kv_sizes import ALLOCATION_BYTES, ArraySizes, PagedSizes, RowSizes
from mlx_edge.engine.memory.machine import find_machine, memory_limit, private_bytes, this_machine
from mlx_edge.engine.memory.model import MemoryModel
from mlx_edge.engine.memory.weight_sizes import measure_weights, packed_matrix_bytes
from mlx_edge.errors import HardwareNotSupportedError, InvalidRequestError
from mlx_edge.models.config import ModelConfig
from mlx_edge.models.decoder import find_arrays
from mlx_edge.models.load import load_model
from mlx_edge.ops.cpu import extension, find_extension
from mlx_edge.quant import Packing
from mlx_edge.weights import Checkpoint
from mlx_edge.weights.hub import find_model
from tests.models.tiny import CONFIGS, make_model, save_model

POCKET = find_model("pocket")
HAS_KERNELS = not isinstance(find_extension(), str)
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="the CPU kernels are not built here")


def fill(cache: Any, heads: int, dim: int, lengths: list[int]) -> int:
    """Steps of these lengths; the most bytes that the cache reserved after any of them."""
    most = 0
    for length in lengths:
        prepare_step([cache])
        rows = mx.random.normal((1, heads, length, dim))
        meta = ops.StepMeta.uniform(cache.offset, batch_size=1, width=length)
        cache.extend(rows, rows, meta)
        mx.eval(cache.arrays)
        most = max(most, cache.nbytes)
    return most


@needs_kernels
@pytest.mark.parametrize(("dim", "bits"), [(64, 0), (80, 0), (64, 8), (64, 4), (96, 4)])
@pytest.mark.parametrize("positions", [1, 64, 65, 200])
def test_pages_are_counted_to_the_byte(dim: int, bits: int, positions: int) -> None:
    row_format = QuantizedRows(bits, 32) if bits else None
    cache = PagedKVCache(dtype=mx.float16, row_format=row_format)
    reserved = fill(cache, 2, dim, [positions])
    rows = RowSizes(2, dim, 2, bits, 32 if bits else 0)
    pages = -(-positions // 64)
    assert PagedSizes(rows).num_bytes(positions, 512) == reserved + pages * ALLOCATION_BYTES


@needs_kernels
@pytest.mark.parametrize(("window", "keep"), [(1, 0), (20, 0), (65, 0), (100, 4), (508, 70)])
@pytest.mark.parametrize("length", [1, 7, 64, 256])
def test_pages_of_a_window_are_the_most_that_steps_anywhere_reserve(
    window: int, keep: int, length: int
) -> None:
    first_lengths = (
        [0] if length < 64 else [0, 1, 18, 58, 62, 63]
    )  # where the later steps begin in a page
    most = 0
    for first in first_lengths:
        cache = PagedKVCache(dtype=mx.float16, window=window, keep=keep)
        lengths = [first] * (first > 0) + [length] * ((1100 - first) // length)
        most = max(most, fill(cache, 2, 64, lengths))
    rows = RowSizes(2, 64, 2)
    counted = PagedSizes(rows, window, keep).num_bytes(1100, length)
    pages = most // rows.page_bytes
    assert counted == pages * (rows.page_bytes + ALLOCATION_BYTES)


@needs_kernels
def test_rows_that_become_packed_are_counted_in_both_formats() -> None:
    packed = PagedSizes(RowSizes(2, 64, 2, 8, 64), float_until=128)
    floats = PagedSizes(RowSizes(2, 64, 2))
    assert packed.num_bytes(128, 64) == floats.num_bytes(128, 64)
    assert packed.num_bytes(192, 64) > floats.num_bytes(192, 64)
    at_once = replace(packed, float_until=0)
    assert packed.num_bytes(4096, 64) == at_once.num_bytes(4096, 64) < floats.num_bytes(4096, 64)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("bits", [0, 8])
def test_arrays_of_a_cache_stay_below_the_sum_and_near_it(window: int | None, bits: int) -> None:
    row_format = QuantizedRows(bits, 64) if bits else None
    cache = KVCache(capacity=1300, window=window, row_format=row_format)
    reserved = fill(cache, 2, 64, [200] * 6 + [1] * 40)
    rows = RowSizes(2, 64, 4, bits, 64 if bits else 0)
    counted = ArraySizes(rows, window).num_bytes(1300, 200)
    assert reserved <= counted <= reserved + (64 + 200) * 4 * rows.row_bytes


@needs_kernels
@pytest.mark.parametrize(
    ("mode", "bits", "group_size"),
    [("affine", 4, 64), ("affine", 3, 32), ("affine", 8, 128), ("mxfp4", 4, 32)],
)
@pytest.mark.parametrize("rows", [16, 37])
def test_a_packed_matrix_has_the_bytes_that_the_kernels_say(
    mode: str, bits: int, group_size: int, rows: int
) -> None:
    ext = extension()
    kind = ext.Float.f32 if mode == "mxfp4" else ext.Float.bf16
    matrix = ext.Matrix(getattr(ext.Format, mode), rows, 256, bits, group_size, kind)
    assert packed_matrix_bytes(rows, 256, Packing(group_size, bits, mode), 2) == matrix.num_bytes


def save_quantized(folder: Path, *, is_tied: bool) -> Path:
    """A tiny model in 4 bits, groups of 32; its float16 norms must be made float32."""
    from mlx import nn

    config = CONFIGS["llama-tied" if is_tied else "llama2"]
    model = make_model(config)
    model.set_dtype(mx.float16)
    nn.quantize(model, group_size=32, bits=4)  # type: ignore[attr-defined]
    return save_model(model, {**config, "quantization": {"group_size": 32, "bits": 4}}, folder)


@needs_kernels
@pytest.mark.parametrize("is_tied", [True, False])
def test_weights_on_the_kernels_are_what_loading_reports(tmp_path: Path, is_tied: bool) -> None:
    folder = save_quantized(tmp_path, is_tied=is_tied)
    model = load_model(folder)
    sizes = MemoryModel.of_folder(folder, EngineConfig(kv_group_size=32), backend="cpu").weights
    packed = model.load_report.packed
    assert packed is not None
    private = sum(array.nbytes for array in find_arrays(model))
    assert packed.num_bytes - 2 * 4096 <= sizes.mapped <= packed.num_bytes
    assert 0 < sizes.private <= private  # a rotary table is no weight of the file


@pytest.mark.parametrize("folder", ["float", "4 bit"])
def test_weights_on_plain_ops_are_the_arrays_that_they_hold(tmp_path: Path, folder: str) -> None:
    path = POCKET if folder == "float" else save_quantized(tmp_path, is_tied=False)
    with ops.use("reference"):
        model = load_model(path)
    with Checkpoint.open(path) as checkpoint:
        sizes = measure_weights(checkpoint, ModelConfig.from_folder(path), "plain")
    arrays = {id(array): array.nbytes for array in find_arrays(model)}
    total = sum(arrays.values())
    assert sizes.mapped + sizes.private == pytest.approx(total, rel=0.01)


def test_a_pack_that_cannot_be_kept_is_private(tmp_path: Path) -> None:
    folder = save_quantized(tmp_path, is_tied=True)
    options = EngineConfig(kv_group_size=32)
    kept = MemoryModel.of_folder(folder, options, backend="cpu").weights
    lost = MemoryModel.of_folder(folder, options, backend="cpu", can_keep_pack=False).weights
    assert (lost.mapped, lost.private) == (0, kept.mapped + kept.private)


def model_of(**options: Any) -> MemoryModel:
    """Pocket on the CPU kernels, beside a process of 20 MB."""
    return MemoryModel.of_folder(POCKET, EngineConfig(**options), backend="cpu").with_base(
        20_000_000
    )


def test_more_of_anything_needs_more() -> None:
    memory = model_of()
    assert memory.kv_bytes(0) == 0
    assert memory.kv_bytes(64) < memory.kv_bytes(65) < memory.kv_bytes(512)
    assert memory.step_bytes(1, 1) < memory.step_bytes(64, 1) < memory.step_bytes(64, 16)
    assert memory.peak_bytes(256, 1) < memory.peak_bytes(512, 1) < memory.peak_bytes(512, 2)
    assert (
        model_of(kv_bits=4).kv_bytes(512) < model_of(kv_bits=8).kv_bytes(512) < memory.kv_bytes(512)
    )
    assert model_of(max_kv_size=64, prefill_chunk=32).kv_bytes(512) < memory.kv_bytes(512)


@pytest.mark.parametrize(
    ("context", "batch_size", "rows"),
    [(128, 1, 127), (1, 1, 1), (513, 1, 512), (4096, 1, 512), (128, 3, 381), (4096, 4, 515)],
)
def test_the_last_token_of_a_context_is_in_no_step(
    context: int, batch_size: int, rows: int
) -> None:
    memory = model_of(prefill_chunk=512)
    expected = memory.step_bytes(rows, batch_size, context)
    assert memory.largest_step_bytes(context, batch_size) == expected


def test_a_chunk_below_the_rows_of_drafts_counts_these() -> None:
    few, more = (model_of(max_kv_size=69, prefill_chunk=rows) for rows in (1, 16))
    assert few.kv_bytes(512) == more.kv_bytes(512)


def test_a_draft_model_adds_its_weights_and_its_caches() -> None:
    memory = model_of()
    both = memory.with_draft(memory)
    assert both.kv_bytes(100) == 2 * memory.kv_bytes(100)
    assert both.mapped_bytes == 2 * memory.mapped_bytes
    assert both.step_bytes(10, 1) == memory.step_bytes(10, 1)


def test_a_start_that_needs_more_than_what_follows_is_the_peak() -> None:
    assert model_of().with_base(20_000_000, 10**9).peak_bytes(64, 1) == 10**9


@pytest.mark.parametrize("free_rows", [0, 1, 17, 200, 10_000])
def test_a_chunk_shrinks_to_what_is_free(free_rows: int) -> None:
    memory = model_of()
    free = memory.step_bytes(free_rows, 4) if free_rows else 0
    assert memory.largest_rows(free, 4) == min(free_rows, 512 + 4)


def test_what_stands_leaves_room_for_requests() -> None:
    memory = model_of(max_batch_size=4)
    budget = MemoryBudget(300_000_000, memory.standing())
    assert sum(memory.standing().values()) < 60_000_000
    assert budget.fits_alone(memory.kv_bytes(512))


def test_groups_that_do_not_divide_a_head_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="heads of 64"):
        model_of(kv_bits=8, kv_group_size=128)


def test_a_loaded_model_is_measured_in_its_process() -> None:
    model = load_model(POCKET)
    memory = MemoryModel.of(model, EngineConfig())
    assert 10_000_000 < memory.base_bytes <= private_bytes() + 10_000_000
    assert memory.kv_bytes(512) == MemoryModel.of_folder(POCKET, EngineConfig()).kv_bytes(512)


def test_machines_have_estimates_below_their_memory() -> None:
    machine = find_machine("m4 max 64GB")
    assert machine.name == "Apple M4 Max, 64 GB" and machine.is_estimate
    assert machine.usable_bytes == 48 << 30
    assert find_machine("Apple M2").memory_bytes == 8 << 30
    assert this_machine().usable_bytes < this_machine().memory_bytes


@pytest.mark.parametrize("text", ["M9", "M4 Max 65 GB", "", "64 GB"])
def test_unknown_machines_are_refused_by_name(text: str) -> None:
    with pytest.raises(HardwareNotSupportedError, match="machine"):
        find_machine(text)


@pytest.mark.parametrize("name", ["memory.max", "memory.limit_in_bytes"])
def test_a_containers_limit_counts(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("max\n")
    physical = memory_limit(tmp_path)
    (tmp_path / name).write_text(f"{1 << 62}\n")  # version 1's way to say none
    assert memory_limit(tmp_path) == physical
    (tmp_path / name).write_text("104857600\n")
    assert memory_limit(tmp_path) == 100 << 20


def test_no_tensor_is_read(tmp_path: Path) -> None:
    """A folder whose weights are a header over nothing but zeros, as large as a real model."""
    path = tmp_path / "model.safetensors"
    source = POCKET / "model.safetensors"
    with source.open("rb") as file:
        header = file.read(8)
        header += file.read(int.from_bytes(header, "little"))
    path.write_bytes(header)
    with path.open("r+b") as file:
        file.truncate(source.stat().st_size)
    (tmp_path / "config.json").write_text((POCKET / "config.json").read_text())
    memory = MemoryModel.of_folder(tmp_path, EngineConfig(), backend="metal")
    assert memory.mapped_bytes + memory.weights_bytes == pytest.approx(7_350_000, rel=0.01)
