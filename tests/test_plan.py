"""`python -m mlx_edge.plan`: figures that add up, lines that fit a terminal, one line for what cannot be planned."""

import json
import shutil
import subprocess
import sys
from typing import Any

import pytest

from mlx_edge.plan import MAX_BATCH, main
from mlx_edge.weights.hub import find_model
from tests.models.vision.folders import write_model


def plan(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    """The JSON that these flags give."""
    assert main([*flags, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_parts_add_up_to_the_peak(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "--context", "256", "--batch", "4")
    parts = ("program", "weights", "kv", "activations", "images", "starting")
    assert sum(found[f"{part}_bytes"] for part in parts) == found["peak_bytes"]
    assert found["peak_bytes"] + found["mapped_bytes"] == found["total_bytes"]
    assert found["kv_bytes"] == 4 * found["kv_bytes_per_sequence"]


def test_what_is_said_to_fit_fits_and_one_more_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    machine = ("--machine", "M1 8 GB", "--device", "plain")
    batch = plan(capsys, *machine)["largest_batch"]
    assert 1 < batch < MAX_BATCH
    assert plan(capsys, *machine, "--batch", str(batch))["fits"]
    assert not plan(capsys, *machine, "--batch", str(batch + 1))["fits"]


def test_the_models_own_limit_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    said = capsys.readouterr().out
    assert "longest context at batch 1: 512, the model's limit" in said


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--batch", "16", "--kv-bits", "4", "--max-kv-size", "100"),
        ("--machine", "M4 Max 128 GB", "--batch", "4096"),
        ("--draft-model", "pocket-draft", "--device", "plain"),
    ],
)
def test_lines_fit_a_terminal(capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]) -> None:
    assert main(list(flags)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("keys and values" in line for line in lines)


def test_other_machines_are_marked_as_estimates(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--machine", "m2 16gb"]) == 0
    assert "Apple M2, 16 GB, Metal kernels (an estimate)" in capsys.readouterr().out


def test_fewer_bits_a_window_and_a_draft_model_count(capsys: pytest.CaptureFixture[str]) -> None:
    whole = plan(capsys, "--device", "cpu")
    assert plan(capsys, "--device", "cpu", "--kv-bits", "4")["kv_bytes"] < whole["kv_bytes"] / 2
    limited = ("--max-kv-size", "32", "--prefill-chunk", "32")
    assert plan(capsys, "--device", "cpu", *limited)["kv_bytes"] < whole["kv_bytes"]
    drafted = plan(capsys, "--device", "cpu", "--draft-model", "pocket-draft")
    assert drafted["kv_bytes"] > whole["kv_bytes"]
    assert drafted["mapped_bytes"] > whole["mapped_bytes"]


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model that sees."""
    folder = write_model("glm4v", tmp_path_factory.mktemp("seeing"))
    shutil.copy(find_model("pocket") / "tokenizer.json", folder)
    return str(folder)


def test_images_are_planned_for(capsys: pytest.CaptureFixture[str], seeing: str) -> None:
    found = plan(capsys, seeing, "--device", "cpu")
    vision = found["vision"]
    assert vision["images"] == 1
    assert 0 < vision["weights_mapped_bytes"] < found["mapped_bytes"]
    assert vision["weights_private_bytes"] <= found["weights_bytes"]
    assert vision["image_tokens"] * 64 == vision["image_pixels"] <= 8192
    none = plan(capsys, seeing, "--device", "cpu", "--images", "0")
    assert none["images_bytes"] == 0 < found["images_bytes"]
    several = plan(capsys, seeing, "--device", "cpu", "--images", "3")
    assert several["images_bytes"] > found["images_bytes"]
    small = plan(capsys, seeing, "--device", "cpu", "--max-pixels", "1024")
    assert small["vision"]["image_pixels"] <= 1024
    assert small["peak_bytes"] < found["peak_bytes"]
    assert main([seeing]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("megapixels" in line for line in lines)
    assert plan(capsys)["vision"] is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--images", "1"], "--images and --max-pixels are for models that see"),
        (["nowhere/at/all"], "no such folder"),
        (["--context", "513"], "--context is 513, the model's context 512"),
        (["--machine", "M4 Max 65 GB"], "M4 Max comes with 36, 48, 64, 128 GB, not 65"),
        (["--kv-bits", "5"], "kv_bits is 5"),
        (["--kv-bits", "4", "--kv-group-size", "128"], "heads of 64"),
    ],
)
def test_what_cannot_be_planned_costs_one_line(
    capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("mlx_edge.plan: error: ") and error.count("\n") == 1
    assert said in error


NO_MLX = """
import sys
from mlx_edge.plan import main
try:
    main(["--batch", "0"])
except SystemExit as end:
    print(end.code, "mlx.core" in sys.modules)
"""


def test_a_wrong_flag_is_answered_without_mlx() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_MLX], capture_output=True, text=True, check=True
    )
    assert done.stdout == "2 False\n" and done.stderr.count("\n") == 1
