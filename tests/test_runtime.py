"""What the runtime says of the machine and of its own installation."""

import mlx.core as mx
import pytest

from mlx_edge import runtime


def test_peak_memory_is_the_process_where_there_is_no_gpu() -> None:
    if runtime.has_gpu():
        pytest.skip("a GPU's memory is MLX's")
    before = runtime.peak_memory_gb()
    assert 0.01 < before < 1000
    held = bytearray(int(before * 1e9) + (64 << 20))
    assert runtime.peak_memory_gb() > before
    del held


def test_floats_become_float32_on_a_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "has_gpu", lambda: False)
    assert runtime.convert_float(mx.zeros((2,), mx.bfloat16)).dtype == mx.float32
    monkeypatch.setattr(runtime, "has_gpu", lambda: True)
    assert runtime.convert_float(mx.zeros((2,), mx.bfloat16)).dtype == mx.bfloat16


def test_an_installation_without_a_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "find_spec", lambda _name: None)
    monkeypatch.setattr(runtime.sys, "platform", "linux")
    assert "without its native CPU part" in (runtime.missing_native_part() or "")
    monkeypatch.setattr(runtime.sys, "platform", "darwin")
    assert runtime.missing_native_part() is None
