"""The switch: the first backend that serves a call runs it, and can say why; a name is never a wish."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import pytest

from mlx_edge import ops
from mlx_edge.errors import HardwareNotSupportedError, InvalidRequestError
from mlx_edge.ops import select
from mlx_edge.ops.reference import IMPLEMENTATIONS
from mlx_edge.ops.select import Backend, Implementation

X = mx.ones((1, 2, 8))
NORM = ops.Norm(mx.ones((8,)), 1e-5)


def refuse_odd(x: mx.array, *_args: Any) -> str | None:
    return f"serves even row counts, got {x.shape[1]}" if x.shape[1] % 2 else None


def fast(missing: str | None = None) -> Backend:
    implementation = Implementation(lambda x, norm: x * 0 + 42, refuse_odd)
    return Backend("fast", lambda: missing, {"rms_norm": implementation})


@pytest.fixture
def with_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "BACKENDS", (fast(), select.REFERENCE))


@pytest.mark.usefixtures("with_fast")
def test_the_first_backend_that_serves_runs() -> None:
    assert ops.rms_norm(X, NORM).tolist() == (X * 0 + 42).tolist()
    assert ops.choose("rms_norm", X, NORM).backend.name == "fast"


@pytest.mark.usefixtures("with_fast")
def test_what_it_refuses_falls_through_and_is_explained() -> None:
    choice = ops.choose("rms_norm", X[:, :1], NORM)
    assert str(choice) == ("fast: serves even row counts, got 1; rms_norm runs on reference")
    assert str(ops.choose("glu", X, X, "silu")) == "fast: has no glu; glu runs on reference"


def test_a_backend_that_the_machine_lacks_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "BACKENDS", (fast("needs a GPU"), select.REFERENCE))
    assert str(ops.choose("rms_norm", X, NORM)) == "fast: needs a GPU; rms_norm runs on reference"


@pytest.mark.usefixtures("with_fast")
def test_a_backend_asked_for_by_name_does_not_fall_back() -> None:
    with ops.use("fast"):
        ops.rms_norm(X, NORM)
        with pytest.raises(HardwareNotSupportedError, match="serves even row counts, got 1"):
            ops.rms_norm(X[:, :1], NORM)
        with pytest.raises(HardwareNotSupportedError, match="has no glu"):
            ops.glu(X, X, "silu")


@pytest.mark.usefixtures("with_fast")
def test_reference_switches_the_fast_ones_off() -> None:
    with ops.reference():
        assert ops.choose("rms_norm", X, NORM).backend.name == "reference"
    assert ops.choose("rms_norm", X, NORM).backend.name == "fast"


def test_reference_ops_have_gradients() -> None:
    weights = ops.MLPWeights(NORM, *(ops.Dense(mx.eye(8)) for _ in range(3)))
    with ops.reference():
        gradient = mx.grad(lambda x: ops.mlp_block(x, weights).sum())(X)
    assert gradient.shape == X.shape
    assert mx.all(mx.isfinite(gradient)).item()


def test_unknown_names_are_refused() -> None:
    with (
        pytest.raises(
            InvalidRequestError,
            match="'vulkan'; this build has metal, cpu, emulated, reference and auto",
        ),
        ops.use("vulkan"),
    ):
        pass


@pytest.mark.parametrize(("value", "code"), [("reference", 0), ("auto", 0), ("vulkan", 2)])
def test_environment_names_a_backend(value: str, code: int) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "mlx_edge.generate", "--max-tokens", "1"],
        env={**os.environ, "MLX_EDGE_OPS": value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == code, found.stderr
    assert code == 0 or "MLX_EDGE_OPS asks for the backend 'vulkan'" in found.stderr


class Recorder:
    """An observer that notes what it sees."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, int, list[str]]] = []

    def __call__(self, op: str, backend: str, compute: Any, args: Any, kwargs: Any) -> Any:
        self.seen.append((op, backend, len(args), sorted(kwargs)))
        return compute()


@pytest.mark.usefixtures("with_fast")
def test_an_observer_sees_every_call_and_who_runs_it() -> None:
    recorder = Recorder()
    with select.observe(recorder):
        fast_y = ops.rms_norm(X, NORM)
        with ops.reference():
            y = ops.rms_norm(X, NORM)
        run_keywords = select.run("glu", X, up=X, activation="silu")
    ops.rms_norm(X, NORM)
    assert recorder.seen == [
        ("rms_norm", "fast", 2, []),
        ("rms_norm", "reference", 2, []),
        ("glu", "reference", 1, ["activation", "up"]),
    ]
    assert fast_y.tolist() == (X * 0 + 42).tolist()
    assert y.tolist() == IMPLEMENTATIONS["rms_norm"](X, NORM).tolist()
    assert run_keywords.shape == X.shape


def test_the_innermost_observer_alone_is_called_and_leaves_with_an_error() -> None:
    outer, inner = Recorder(), Recorder()
    with select.observe(outer):
        with pytest.raises(ValueError, match="mid-run"), select.observe(inner):
            ops.rms_norm(X, NORM)
            raise ValueError("mid-run")
        ops.glu(X, X, "silu")
    assert [call[0] for call in inner.seen] == ["rms_norm"]
    assert [call[0] for call in outer.seen] == ["glu"]


def test_another_thread_is_not_observed() -> None:
    recorder = Recorder()
    with select.observe(recorder), ThreadPoolExecutor(1) as pool:
        pool.submit(ops.choose, "rms_norm", X, NORM).result()
        pool.submit(lambda: select.run("rms_norm", X, NORM) is None).result()
    assert recorder.seen == []


def test_unobserved_nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("built for an observer that is not there")

    monkeypatch.setattr(select, "partial", fail)
    assert ops.rms_norm(X, NORM).shape == X.shape
