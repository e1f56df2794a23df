"""MLX's float products on OpenBLAS: right in every shape, really served by it, in whichever order things are loaded."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_edge import runtime
from mlx_edge.runtime import connect_blas

REASON = connect_blas() if sys.platform == "linux" else "macOS has Accelerate in MLX already"
needs_openblas = pytest.mark.skipif(REASON is not None, reason=f"no OpenBLAS: {REASON}")
FEW_AND_MANY = (1, 2, 5, 65, 700)


def random(*shape: int) -> mx.array:
    return mx.array(np.random.default_rng(7).standard_normal(shape), mx.float32)


def exact(array: mx.array) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array(array, dtype=np.float64)


def on_cpu(solve: Callable[..., Any], matrix: mx.array) -> Any:
    return solve(matrix, stream=mx.cpu)


def native() -> Any:
    return import_module("mlx_edge._native._cpu")


@needs_openblas
@pytest.mark.parametrize("is_b_turned", [False, True])
@pytest.mark.parametrize("is_a_turned", [False, True])
@pytest.mark.parametrize("m", FEW_AND_MANY)
@pytest.mark.parametrize("n", FEW_AND_MANY)
def test_a_product_is_right(m: int, n: int, is_a_turned: bool, is_b_turned: bool) -> None:
    for k in (1, 3, 64, 300):
        a = random(k, m).T if is_a_turned else random(m, k)
        b = random(n, k).T if is_b_turned else random(k, n)
        right = exact(a) @ exact(b)
        mx.eval(mx.full((m, n), mx.nan))  # what the result's memory may hold before
        np.testing.assert_allclose(exact(a @ b), right, rtol=0, atol=2e-5 * k**0.5)
        summed = mx.addmm(mx.ones((m, n)), a, b, alpha=0.5, beta=2)
        np.testing.assert_allclose(exact(summed), 0.5 * right + 2, rtol=0, atol=2e-5 * k**0.5)


@needs_openblas
@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (5, 3, 0)])
def test_an_empty_product_is_empty_or_zero(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    np.testing.assert_array_equal(exact(mx.ones((m, k)) @ mx.ones((k, n))), np.zeros((m, n)))


@needs_openblas
@pytest.mark.parametrize("dtype", [mx.float32, mx.float64, mx.complex64])
def test_batches_and_other_types_are_right(dtype: mx.Dtype) -> None:
    with mx.stream(mx.cpu):
        a, b = random(3, 17, 40).astype(dtype), random(40, 90).astype(dtype)
        found, right = np.array(a @ b), np.array(a) @ np.array(b)
    np.testing.assert_allclose(found, right, rtol=0, atol=1e-4)


@needs_openblas
def test_every_float32_product_goes_through_ours() -> None:
    a, b = random(300, 200), random(200, 100)
    mx.eval(a, b)
    before = native().blas_products()
    mx.eval(a @ b)
    assert native().blas_products() == before + 1


@needs_openblas
def test_the_number_of_threads_changes_no_bit() -> None:
    num_threads = native().num_threads()
    a, b = random(129, 500), random(500, 1300)
    found = []
    for count in (1, 2, 3):
        native().set_threads(count)
        found.append(exact(a @ b))
    native().set_threads(num_threads)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


@needs_openblas
def test_a_training_step_has_the_right_gradients() -> None:
    x, up, down = random(33, 40), random(40, 130) / 6, random(130, 20) / 11

    def loss(up: mx.array, down: mx.array) -> mx.array:
        return mx.square(mx.maximum(x @ up, 0) @ down).sum()

    found_up, found_down = mx.grad(loss, argnums=(0, 1))(up, down)
    hidden = np.maximum(exact(x) @ exact(up), 0)
    error = 2 * hidden @ exact(down)
    right_up = exact(x).T @ (error @ exact(down).T * (hidden > 0))
    np.testing.assert_allclose(exact(found_down), hidden.T @ error, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(exact(found_up), right_up, rtol=1e-4, atol=1e-3)


@needs_openblas
def test_lapack_still_factors() -> None:
    x = random(80, 60)
    square = x.T @ x / 80 + mx.eye(60)
    low = on_cpu(mx.linalg.cholesky, square)
    np.testing.assert_allclose(exact(low) @ exact(low).T, exact(square), atol=1e-5)
    inverse = on_cpu(mx.linalg.inv, square)
    np.testing.assert_allclose(exact(inverse) @ exact(square), np.eye(60), atol=1e-4)
    u, s, v = on_cpu(mx.linalg.svd, square)
    np.testing.assert_allclose(exact(u) * exact(s) @ exact(v), exact(square), atol=1e-4)
    q, r = on_cpu(mx.linalg.qr, x)
    np.testing.assert_allclose(exact(q) @ exact(r), exact(x), atol=1e-5)
    values, vectors = on_cpu(mx.linalg.eigh, square)
    again = exact(vectors) * exact(values) @ exact(vectors).T
    np.testing.assert_allclose(again, exact(square), atol=1e-4)
    turns = on_cpu(mx.linalg.eigvals, mx.array([[0.0, -1.0], [1.0, 0.0]]))
    assert sorted(np.array(turns).imag) == pytest.approx([-1, 1])


def run_apart(program: str, **environment: str) -> str:
    """What the program prints, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


@needs_openblas
@pytest.mark.parametrize(
    "before", ["", "import mlx.core as mx; mx.eval(mx.ones((9, 9)) @ mx.ones((9, 9)));"]
)
def test_it_does_not_matter_whether_mlx_was_used_before(before: str) -> None:
    program = f"""{before}
from mlx_edge.runtime import connect_blas
import mlx.core as mx
reason = connect_blas()
from mlx_edge._native import _cpu
mx.eval(mx.ones((9, 9)) @ mx.ones((9, 9)))
libraries = open("/proc/self/maps").read()
print(reason, _cpu.blas_products(), "libscipy_openblas.so" in libraries)"""
    assert run_apart(program) == "None 1 True"


@needs_openblas
def test_the_affinity_mask_decides_how_many_threads_work() -> None:
    program = """import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from mlx_edge.runtime import connect_blas
import mlx.core as mx
connect_blas()
from mlx_edge._native import _cpu
mx.eval(mx.ones((500, 500)) @ mx.ones((500, 500)))
print(_cpu.num_threads())"""
    assert run_apart(program) == "1"


@needs_openblas
def test_mlx_keeps_its_own_when_asked_to() -> None:
    program = """from mlx_edge.runtime import connect_blas
print(connect_blas())
print("libscipy_openblas.so" in open("/proc/self/maps").read())"""
    reason, is_loaded = run_apart(program, MLX_EDGE_BLAS="mlx").splitlines()
    assert "MLX_EDGE_BLAS=mlx" in reason
    assert is_loaded == "False"


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has Accelerate in MLX already")
def test_without_the_package_the_reason_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtime, "missing_native_part", lambda: None)
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    assert "pip install scipy-openblas32" in (connect_blas.__wrapped__() or "")
