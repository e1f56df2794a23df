"""A device takes what `mx.fast.metal_kernel` takes, compiles what MLX generates, and binds what MLX binds."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal_emulator import Device, MetalError
from metal_emulator.generated import generated_source

ATTRIBUTE = "uint i = thread_position_in_grid.x;"


def run(
    source: str,
    inputs: dict[str, Any],
    shape: tuple[int, ...],
    dtype: mx.Dtype = mx.float32,
    *,
    device: Device | None = None,
    **more: Any,
) -> mx.array:
    """One launch over as many threads as the output has elements."""
    options = {
        name: more.pop(name)
        for name in ("header", "ensure_row_contiguous", "atomic_outputs")
        if name in more
    }
    device = device or Device()
    kernel = device.metal_kernel("tried", list(inputs), ["y"], source, **options)
    size = int(np.prod(shape))
    launch = {"grid": (size, 1, 1), "threadgroup": (min(size, 32), 1, 1)} | more
    (y,) = kernel(
        inputs=list(inputs.values()), output_shapes=[shape], output_dtypes=[dtype], **launch
    )
    return y


@pytest.mark.parametrize("mode", ["fast", "check", "count"])
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize(
    "dtype", [mx.float32, mx.float16, mx.bfloat16, mx.int32, mx.uint8, mx.int64, mx.bool_]
)
def test_every_dtype_comes_back(mode: str, order: int, dtype: mx.Dtype) -> None:
    x = (mx.arange(40) % 7).astype(dtype)
    device = Device(mode, order)
    y = run(f"{ATTRIBUTE} y[i] = x[i];", {"x": x}, (40,), dtype, device=device)
    assert y.dtype == dtype
    assert mx.array_equal(y, x)
    (launch,) = device.launches
    assert (launch.name, launch.grid, launch.threadgroup) == ("tried", (40, 1, 1), (32, 1, 1))
    assert (launch.counts is not None) == (mode == "count")


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9])
def test_small_inputs_are_constant_as_in_mlx(size: int) -> None:
    space = "constant" if 0 < size < 8 else "device"
    source = f"{ATTRIBUTE} const {space} float* p = x; y[i] = p[i];"
    if size == 0:
        return
    assert mx.array_equal(
        run(source, {"x": mx.arange(size).astype(mx.float32)}, (size,)), mx.arange(size)
    )
    other = {"constant": "device", "device": "constant"}[space]
    with pytest.raises(MetalError, match="cannot initialize"):
        run(source.replace(space, other), {"x": mx.arange(size).astype(mx.float32)}, (size,))


def test_scalars_are_references() -> None:
    y = run(
        f"{ATTRIBUTE} y[i] = x[i] * a + b;", {"x": mx.arange(8.0), "a": 3, "b": mx.array(0.5)}, (8,)
    )
    assert mx.array_equal(y, mx.arange(8.0) * 3 + 0.5)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ([("T", mx.float16), ("N", 3), ("F", True)], 3.0),
        ([("T", mx.float32), ("N", -3), ("F", False)], 3.0),
        ([("T", mx.bfloat16), ("N", 0), ("F", True)], 0.0),
    ],
)
def test_templates(template: list[tuple[str, Any]], expected: float) -> None:
    y = run(
        f"{ATTRIBUTE} y[i] = F ? T(N) : T(-N);",
        {"x": mx.zeros(8)},
        (8,),
        dtype=mx.float32,
        template=template,
    )
    assert mx.array_equal(y, mx.full((8,), expected))


def test_true_and_1_are_different_templates() -> None:
    device = Device()
    kernel = device.metal_kernel("k", ["x"], ["y"], f"{ATTRIBUTE} y[i] = sizeof(F == F) + int(F);")
    for value in (1, True, 1):
        launch: dict[str, Any] = {
            "inputs": [mx.zeros(8)],
            "output_shapes": [(8,)],
            "output_dtypes": [mx.int32],
        }
        kernel(**launch, template=[("F", value)], grid=(8, 1, 1), threadgroup=(8, 1, 1))
    assert len(kernel._compiled) == 2


def test_shape_arguments_are_passed_where_the_source_has_their_names() -> None:
    x = mx.zeros((3, 4, 5))
    y = run(
        f"{ATTRIBUTE} y[i] = i < 3 ? x_shape[i] : i < 6 ? int(x_strides[i - 3]) : x_ndim;",
        {"x": x},
        (7,),
        mx.int32,
    )
    assert y.tolist() == [3, 4, 5, 20, 5, 1, 3]


@pytest.mark.parametrize("contiguous", [True, False])
def test_strided_inputs(contiguous: bool) -> None:
    base = mx.arange(60).reshape(5, 12).astype(mx.bfloat16)
    x = base[1:4, 2:10:2]
    index = "i / 4 * x_strides[0] + i % 4 * x_strides[1]"
    y = run(
        f"{ATTRIBUTE} y[i] = x[{index}];",
        {"x": x},
        (12,),
        mx.bfloat16,
        ensure_row_contiguous=contiguous,
    )
    assert mx.array_equal(y.reshape(3, 4), x)
    strides = run(
        f"{ATTRIBUTE} y[i] = x_strides[i];",
        {"x": x},
        (2,),
        mx.int32,
        ensure_row_contiguous=contiguous,
    )
    assert strides.tolist() == ([4, 1] if contiguous else [12, 2])


def test_a_strided_input_ends_where_its_last_element_ends() -> None:
    x = mx.arange(60).reshape(5, 12)[1:4, 2:10:2]
    with pytest.raises(MetalError, match=r"x .* has 124 bytes"):
        run(f"{ATTRIBUTE} y[i] = x[31 + i];", {"x": x}, (8,), mx.int32, ensure_row_contiguous=False)


def test_negative_strides_are_copied_or_refused() -> None:
    x = mx.arange(16)[::-1]
    assert mx.array_equal(run(f"{ATTRIBUTE} y[i] = x[i];", {"x": x}, (16,), mx.int32), x)
    with pytest.raises(MetalError, match="'x' has negative strides"):
        run(f"{ATTRIBUTE} y[i] = x[i];", {"x": x}, (16,), mx.int32, ensure_row_contiguous=False)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.int32])
def test_init_value_fills_outputs(dtype: mx.Dtype) -> None:
    y = run(
        f"{ATTRIBUTE} if (i == 3) y[i] = x[i];",
        {"x": mx.arange(16).astype(dtype)},
        (16,),
        dtype,
        init_value=2.5,
    )
    expected = mx.full((16,), 2.5).astype(dtype)
    expected[3] = 3
    assert mx.array_equal(y, expected)


def test_unwritten_outputs_are_an_error_unless_named() -> None:
    source = f"{ATTRIBUTE} if (i != 3) y[i] = x[i];"
    with pytest.raises(MetalError) as caught:
        run(source, {"x": mx.zeros(16)}, (16,))
    assert caught.value.kind == "unwritten_output"
    y = run(source, {"x": mx.zeros(16)}, (16,), device=Device(unwritten_ok=("y",)))
    assert bool(mx.isnan(y[3]))


def test_atomic_outputs() -> None:
    source = "uint i = thread_position_in_grid.x; atomic_fetch_add_explicit(&y[i % 2], int(i), memory_order_relaxed);"
    y = run(
        source,
        {"x": mx.zeros(8)},
        (2,),
        mx.int32,
        atomic_outputs=True,
        init_value=0,
        grid=(64, 1, 1),
        threadgroup=(32, 1, 1),
    )
    assert y.tolist() == [sum(range(0, 64, 2)), sum(range(1, 64, 2))]


def test_a_grid_is_in_threads_and_its_last_group_may_be_ragged() -> None:
    source = "uint i = thread_position_in_grid.x; y[i] = threads_per_threadgroup.x * 100 + threadgroups_per_grid.x;"
    y = run(source, {"x": mx.zeros(8)}, (70,), mx.int32, grid=(70, 1, 1), threadgroup=(32, 1, 1))
    assert y.tolist() == [3203] * 64 + [603] * 6


def test_two_outputs_and_lazy_inputs() -> None:
    kernel = Device().metal_kernel(
        "two", ["x"], ["a", "b"], f"{ATTRIBUTE} a[i] = x[i]; b[i] = -x[i];"
    )
    x = mx.arange(8.0) + 1  # not evaluated
    a, b = kernel(
        inputs=[x],
        output_shapes=[(8,), (2, 4)],
        output_dtypes=[mx.float32, mx.float16],
        grid=(8, 1, 1),
        threadgroup=(8, 1, 1),
    )
    assert mx.array_equal(a, x)
    assert mx.array_equal(b, -x.reshape(2, 4).astype(mx.float16))


def test_each_kind_of_arguments_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = []

    def generated(*arguments: Any, **more: Any) -> str:
        texts.append(generated_source(*arguments, **more))
        return texts[-1]

    monkeypatch.setattr("metal_emulator.device.generated_source", generated)
    kernel = Device("fast").metal_kernel("k", ["x"], ["y"], f"{ATTRIBUTE} y[i] = x[i];")
    for size in (8, 9, 700, 7, 3, 8):
        (y,) = kernel(
            inputs=[mx.arange(size)],
            output_shapes=[(size,)],
            output_dtypes=[mx.int32],
            grid=(size, 1, 1),
            threadgroup=(8, 1, 1),
        )
        assert y.tolist() == list(range(size))
    assert len(texts) == 2


def test_the_same_array_changed_between_launches_is_read_anew() -> None:
    kernel = Device("fast").metal_kernel("k", ["x"], ["y"], f"{ATTRIBUTE} y[i] = x[i];")
    x = mx.zeros((4096,))
    launch: dict[str, Any] = {
        "output_shapes": [(4096,)],
        "output_dtypes": [mx.float32],
        "grid": (4096, 1, 1),
        "threadgroup": (32, 1, 1),
    }
    for value in range(3):
        x[5] = value
        (y,) = kernel(inputs=[x], **launch)
        assert y[5].item() == value


def test_errors_of_mlx_about_arguments_pass_through() -> None:
    kernel = Device().metal_kernel("k", ["x", "z"], ["y"], "y[0] = 1;")
    with pytest.raises(ValueError, match="Expected `inputs` to have size 2"):
        kernel(
            inputs=[mx.zeros(8)],
            output_shapes=[(1,)],
            output_dtypes=[mx.float32],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
        )
    with pytest.raises(ValueError, match="at least one output"):
        Device().metal_kernel("k", ["x"], [], "")


@pytest.mark.parametrize(
    ("threadgroup", "grid"),
    [((0, 1, 1), (8, 1, 1)), ((32, 32, 2), (64, 64, 2)), ((-1, 1, 1), (8, 1, 1))],
)
def test_threadgroups_that_metal_refuses(
    threadgroup: tuple[int, ...], grid: tuple[int, ...]
) -> None:
    with pytest.raises(MetalError, match="expected 1 to 1024 threads"):
        run("y[0] = x[0];", {"x": mx.zeros(8)}, (1,), threadgroup=threadgroup, grid=grid)


def test_mlx_s_early_end_of_the_parameters_is_an_error_here_too() -> None:
    """Two outputs, a shape argument and no attribute: MLX writes a list that no compiler takes."""
    kernel = Device().metal_kernel("k", ["x"], ["y", "z"], "y[0] = x_shape[0]; z[0] = 1;")
    with pytest.raises(MetalError):
        kernel(
            inputs=[mx.zeros(8)],
            output_shapes=[(1,), (1,)],
            output_dtypes=[mx.float32] * 2,
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
        )


@pytest.mark.parametrize("mode", ["slow", ""])
def test_an_unknown_mode_is_refused(mode: str) -> None:
    with pytest.raises(ValueError, match="is none of fast, check, count"):
        Device(mode)


CASES: list[tuple[str, list[mx.array], list[tuple[str, Any]], bool]] = [
    (f"{ATTRIBUTE} y[i] = x[i];", [mx.zeros(9)], [], False),
    (f"{ATTRIBUTE} y[i] = x[i];", [mx.zeros(7, mx.bfloat16)], [], False),
    (f"{ATTRIBUTE} y[i] = x;", [mx.array(3)], [("T", mx.float16), ("N", -3), ("F", False)], False),
    (
        "y[0] = x_shape[0] + x_ndim + x_strides[0]; // grid_origin",
        [mx.zeros((2, 4), mx.int64)],
        [],
        False,
    ),
    (
        "uint i = dispatch_threads_per_threadgroup.x; y[0] = simd_sum(x[0]);",
        [mx.zeros(8, mx.bool_)],
        [("N", 4)],
        True,
    ),
]


@pytest.mark.parametrize(("source", "inputs", "template", "atomic"), CASES)
def test_the_source_is_what_mlx_prints(
    source: str,
    inputs: list[mx.array],
    template: list[tuple[str, Any]],
    atomic: bool,
    capfd: pytest.CaptureFixture[str],
) -> None:
    kernel: Any = mx.fast.metal_kernel(
        name="k",
        input_names=["x"],
        output_names=["y"],
        source=source,
        header="// head\n",
        atomic_outputs=atomic,
    )
    got = generated_source(
        kernel, inputs, output_shapes=[(8,)], output_dtypes=[mx.float32], template=template
    )
    assert got.startswith("// head\n")
    assert source in got
    space = "constant" if inputs[0].size < 8 else "device"
    assert f"const {space} " in got
    assert got.count("[[host_name(") == bool(template)
    assert ("atomic<float>" in got) == atomic
    assert "Generated source code" not in got
    assert not capfd.readouterr().out, "what MLX prints is not let through"
    for name in ("shape", "strides", "ndim"):
        assert (f"x_{name} [[buffer(" in got) == (f"x_{name}" in source)


def test_verbose_prints_the_source(capsys: pytest.CaptureFixture[str]) -> None:
    run(f"{ATTRIBUTE} y[i] = x[i];", {"x": mx.zeros(8)}, (8,), verbose=True)
    assert "[[kernel]] void custom_kernel_tried" in capsys.readouterr().out
