"""The benchmark command: what it prints adds up, what it measures is what was asked for, wrong flags are one line."""

import json
import subprocess
import sys
from collections.abc import Callable

import mlx.core as mx
import pytest

from mlx_edge import benchmark
from mlx_edge.benchmark import main
from mlx_edge.decoding.trials import Plan, Trials
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.decoder import Decoder
from mlx_edge.models.load import load_model
from mlx_edge.profiler.roofline import Bandwidth
from mlx_edge.weights.hub import find_model

SMALL = ("-p", "12", "-g", "4", "-n", "2")
Run = Callable[..., tuple[str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process; returns stdout and stderr, asserts the exit code."""

    def call(*arguments: str, code: int = 0) -> tuple[str, str]:
        try:
            found = main(list(arguments))
        except SystemExit as exit_:
            found = exit_.code
        captured = capfd.readouterr()
        assert found == code, captured.err
        return captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def pocket() -> Decoder:
    return load_model(find_model("pocket"))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_json_fields_add_up(run: Run, batch_size: int) -> None:
    out, progress = run(*SMALL, "-d", "9", "-b", str(batch_size), "-o", "json")
    result = json.loads(out)
    asked = ("prompt_tokens", "generation_tokens", "depth", "batch_size", "num_trials")
    assert [result[name] for name in asked] == [12, 4, 9, batch_size, 2]
    assert progress.count("Trial ") == 2
    for trial in result["trials"]:
        assert trial["total_s"] * 1e3 == pytest.approx(trial["ttft_ms"] + 3 * trial["tpot_ms"])
        assert trial["prompt_tps"] == pytest.approx(12e3 * batch_size / trial["ttft_ms"])
        assert trial["generation_tps"] == pytest.approx(1e3 * batch_size / trial["tpot_ms"])
        assert 0 < trial["peak_memory"] < result["process_peak_memory"] + 1
    first, second = (trial["tpot_ms"] for trial in result["trials"])
    assert result["mean"]["tpot_ms"] == pytest.approx((first + second) / 2)
    assert result["deviation"]["tpot_ms"] == pytest.approx(abs(first - second) / 2**0.5)
    assert {"embed", "attention_block", "mlp_block", "head"} <= set(result["backends"])
    assert result["machine"]["cores"] >= 1


def test_markdown_is_a_table_of_one_row_and_its_origin(run: Run) -> None:
    out, _ = run(*SMALL, "-o", "md")
    header, rule, row, blank, origin = out.splitlines()
    assert header.count("|") == rule.count("|") == row.count("|") == 11
    assert row.startswith("| pocket | 12 | 4 | 0 | 1 | ") and row.count(" ± ") == 4
    assert blank == ""
    assert origin.startswith("Machine: ") and "Ops: " in origin and "2 trials" in origin


def test_plain_output_has_mlx_lms_words(run: Run) -> None:
    out, _ = run("--prompt-tokens", "12", "--generation-tokens", "4", "--num-trials", "1")
    lines = out.splitlines()
    assert lines[0] == "Running warmup.."
    assert lines[1].startswith("Timing with prompt_tokens=12, generation_tokens=4,")
    assert lines[2].startswith("Trial 1:  prompt_tps=")
    assert "generation_tps=" in lines[2] and "peak_memory=" in lines[2]
    assert (
        lines[3].startswith("Prompt: ") and "±" not in lines[3]
    )  # one trial deviates from nothing
    assert any(line.startswith("Ops: ") and "attention_block" in line for line in lines)


def test_the_backend_that_was_asked_for_is_the_one_reported(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_edge.ops import use

    with use("reference"):
        result = json.loads(run(*SMALL, "-o", "json")[0])
    assert {served["backend"] for served in result["backends"].values()} == {"reference"}
    assert result["machine"]["cpu_kernels"] is None


def test_lengths_left_open_fit_the_context(pocket: Decoder) -> None:
    args = benchmark.make_parser().parse_args([])
    assert benchmark.make_plan(args, 4096) == Plan(512, 128)
    assert benchmark.make_plan(args, 512) == Plan(256, 128)
    assert benchmark.make_plan(args, 100) == Plan(50, 50)
    args = benchmark.make_parser().parse_args(["-d", "60", "-g", "30"])
    assert benchmark.make_plan(args, 100) == Plan(10, 30, 60)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("-g", "1"), "--generation-tokens"),
        (("-p", "0"), "--prompt-tokens"),
        (("-n", "0"), "--num-trials"),
        (("-b", "x"), "--batch-size"),
        (("-d", "-1"), "--depth"),
        (("--delay", "soon"), "--delay"),
        (("-o", "csv"), "--output"),
        (("--trust-remote-code",), "unrecognized arguments: --trust-remote-code"),
        (("-p", "500", "-g", "20"), "the model's context is 512"),
        (("-d", "511"), "the model's context is 512"),
        (("--model", "./nowhere"), "./nowhere"),
        (("--kv-bits", "5", *SMALL), "5"),
    ],
)
def test_wrong_flags_are_one_line(run: Run, flags: tuple[str, ...], words: str) -> None:
    out, err = run(*flags, code=2)
    message = err.splitlines()[-1]
    assert message.startswith("mlx_edge.benchmark: error: ") and words in message
    assert "Trial" not in out


def test_a_trial_stores_and_reads_what_the_plan_says(pocket: Decoder) -> None:
    made = []

    def make_cache() -> list[object]:
        made.append(pocket.make_cache())
        return made[-1]

    trials = Trials(pocket, Plan(7, 5, depth=6, batch_size=2), make_cache, prefill_step_size=3)
    trials.run()
    # The newest token of a generation has not been read.
    assert made[0][0].offsets == (6 + 7 + 4,) * 2


def test_a_step_reads_the_weights_once_and_the_cache(pocket: Decoder) -> None:
    rows = {}
    for depth in (0, 100):
        trials = Trials(pocket, Plan(4, 2, depth=depth), pocket.make_cache)
        trials.run()
        rows[depth] = trials.step_bytes()
    # 2 (keys, values) x 4 layers x 2 kv heads x 64 numbers of at least 2 bytes, per position
    assert rows[100] - rows[0] >= 100 * 2 * 4 * 2 * 64 * 2
    assert rows[0] > 3.1e6  # 3.1 million of the parameters stand in the layers


def test_a_plan_beyond_reason_is_refused(pocket: Decoder) -> None:
    with pytest.raises(InvalidRequestError, match="generation_tokens is 1"):
        Plan(5, 1)
    with pytest.raises(InvalidRequestError, match="context is 512"):
        Trials(pocket, Plan(500, 13), pocket.make_cache)


def test_the_share_of_the_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    roof = Bandwidth("CPU", 20.0, 10.0, 2, 1 << 28, 7, 1.0)
    monkeypatch.setattr("mlx_edge.profiler.machine_bandwidth", lambda: roof, raising=False)
    monkeypatch.setattr("mlx_edge.profiler.roofline.last_level_cache_bytes", lambda: 1 << 20)
    share = benchmark.measure_share(700e6, 50.0)  # 14 GB/s
    assert share == {"step_mb": 700, "step_gbs": 14, "read_gbs": 20, "share": 0.7}
    if mx.default_device().type == mx.DeviceType.cpu:
        assert benchmark.measure_share(1 << 20, 50.0) is None


def test_it_is_a_command_of_the_package() -> None:
    command = [sys.executable, "-m", "mlx_edge", "benchmark", *SMALL, "-o", "json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["model"] == "pocket"


def test_kernels_are_explained_instead(run: Run) -> None:
    out, _ = run("--explain-kernels")
    assert out.startswith("steps of 1 row:\n  embed: ")
    assert "  mlp_block of layer 0 to layer 3: " in out
    assert "tokens-per-sec" not in out
