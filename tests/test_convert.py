"""The command: flags that do not go together are named, what was done is said, a killed run is continued."""

import json
import random
import signal
import subprocess
import sys
from contextlib import ExitStack

import mlx.core as mx
import pytest

from mlx_edge import convert, load
from mlx_edge.calibration import sensitivity
from mlx_edge.calibration.receipt import read_receipt
from mlx_edge.conversion.source import FolderSource
from mlx_edge.convert import main
from mlx_edge.quant import Packing
from mlx_edge.weights import write_checkpoint
from mlx_edge.weights.hub import find_model
from tests.conversion.folders import make_folder, read_weights
from tests.conversion.gguf_files import add_sentencepiece, write_model

SMALL = ("--num-samples", "4", "--sequence-length", "32")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "--model is missing"),
        (("--q-bits", "4"), "--q-bits needs -q"),
        (("--quant-predicate", "mixed_2_6"), "--quant-predicate needs -q"),
        (("--method", "gptq"), "--method needs -q"),
        (("--seed", "1"), "--seed needs -q"),
        (("-q", "-d"), "-q and -d exclude"),
        (("-q", "--realign"), "-q and --realign exclude"),
        (("--realign", "--dtype", "float16"), "--realign and --dtype exclude"),
        (
            ("-q", "--q-bits", "3", "--quant-predicate", "mixed_3_6"),
            "--q-bits and --quant-predicate",
        ),
        (("-q", "--target-bpw", "4", "--q-group-size", "32"), "--q-group-size and --target-bpw"),
        (("-q", "--target-bpw", "4", "--max-kl", "0.1"), "--target-bpw and --max-kl exclude"),
        (("-q", "--sensitivities", "x"), "--sensitivities needs"),
        (("-q", "--q-mode", "mxfp4", "--q-bits", "8"), "mxfp4 has bits of 4"),
        (("-q", "--q-mode", "nvfp4", "--method", "gptq"), "--q-mode nvfp4 goes with"),
        (("-q", "--q-mode", "mxfp4", "--q-scheme", "symmetric"), "--q-scheme and --q-per go with"),
        (("-q", "--no-receipt", "--calibration", "x"), "nothing reads the text"),
        (("--activations", "static"), "--activations needs -q"),
        (("--upload-repo", "a/b"), "--upload-repo: nothing is uploaded"),
        (("--trust-remote-code",), "--trust-remote-code: no code"),
        (("--diagnose", "a", "b", "-q"), "-q does not go with --diagnose"),
        (("--plot", "x.svg"), "--plot needs --diagnose"),
        (("-q", "--q-bits", "7"), "--q-bits: invalid choice"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_flags_that_do_not_go_together_are_named(flags, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = () if not flags or "--diagnose" in flags else ("--model", "pocket")
    try:
        code = main([*model, *flags])
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr().err
    assert code == 2 and words in captured
    assert len(captured.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_quantized_folder_has_a_receipt_and_the_end_says_so(capsys, tmp_path):
    target = tmp_path / "pocket-4bit"
    assert main(["--hf-path", "pocket", "--mlx-path", str(target), "-q", *SMALL]) == 0
    said = capsys.readouterr().out
    receipt = read_receipt(target)
    assert receipt.kl_mean > 0 and receipt.calibrated_on is None
    for words in ("4.507", "KL divergence", "28.", f"generate --model {target}"):
        assert words in said
    assert "pocket-4bit" in (target / "README.md").read_text()


def test_static_activations_are_in_the_folder_and_in_the_receipt(tmp_path):
    text = (*SMALL, "--q-bits", "8", "--calibration", str(find_model("pocket") / "README.md"))
    ways = {"static": ("--activations", "static"), "dynamic": ()}
    for name, flags in ways.items():
        assert (
            main(["--model", "pocket", "--mlx-path", str(tmp_path / name), "-q", *text, *flags])
            == 0
        )
    scales = json.loads((tmp_path / "static" / "config.json").read_text())[
        "activation_quantization"
    ]["scales"]
    assert len(scales) == 4 * 6 + 1 and not any("down_proj" in name for name in scales)
    with ExitStack() as stack:
        checkpoints = [stack.enter_context(FolderSource(tmp_path / name)) for name in ways]
        assert checkpoints[0].names() == checkpoints[1].names()
    static, dynamic = (read_receipt(tmp_path / name) for name in ways)
    assert static.kl_mean > dynamic.kl_mean and static.calibrated_on is not None
    model, _ = load(str(tmp_path / "static"))
    assert model.layers[0].mlp.gate.input_scale == scales["model.layers.0.mlp.gate_proj"]
    assert getattr(model.layers[0].mlp.down, "input_scale", None) is None


def test_a_method_that_runs_the_model_takes_a_gguf_file(tmp_path):
    with FolderSource(find_model("pocket")) as source:
        weights = {name: source.read(name) for name in source.names()}
        tokenizer = add_sentencepiece(source.folder)
        path = write_model(tmp_path / "p.gguf", source.config, weights, tokenizer=tokenizer)
    arguments = ["--model", str(path), "--mlx-path", str(tmp_path / "m"), "-q"]
    assert main([*arguments, "--method", "smooth", *SMALL]) == 0
    receipt = read_receipt(tmp_path / "m")
    assert receipt.kl_mean > 0 and receipt.calibrated_on.source == "built-in"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "p.gguf"]


def test_a_target_that_is_there_is_refused_without_force(capsys, tmp_path):
    target = tmp_path / "m"
    arguments = ["--model", "pocket", "--mlx-path", str(target)]
    assert main(arguments) == 0
    before = read_weights(target)
    assert main([*arguments, "--dtype", "float32"]) == 2
    assert "is there already; give --force" in capsys.readouterr().err
    assert read_weights(target) == before
    assert main([*arguments, "--dtype", "float32", "--force"]) == 0
    assert mx.load(str(target / "model.safetensors"))["model.norm.weight"].dtype == mx.float32


def test_one_sensitivity_table_serves_several_budgets(tmp_path, monkeypatch):
    candidates = Packing(32, 4), Packing(32, 8)
    monkeypatch.setattr(sensitivity, "CANDIDATES", candidates)
    source, table = make_folder(tmp_path / "a", vocab_size=2048), tmp_path / "table.json"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        pocket = convert.Path(convert.__file__).parent / "assets" / "pocket" / name
        (source / name).write_text(pocket.read_text())
    sizes = []
    for bits in ("9", "6"):
        target = tmp_path / f"m{bits}"
        flags = ("--target-bpw", bits, "--sensitivities", str(table), *SMALL)
        assert main(["--model", str(source), "--mlx-path", str(target), "-q", *flags]) == 0
        sizes.append(read_receipt(target).bits_per_weight)
        assert json.loads((target / "sensitivity.json").read_text()) == json.loads(
            table.read_text()
        )
    assert sizes[0] > sizes[1] and sizes[1] < 6.3


def start(source, target, *flags, **options):
    command = [sys.executable, "-m", "mlx_edge.convert", "--model", str(source)]
    return subprocess.Popen(
        [*command, "--mlx-path", str(target), *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


# The command with shards so small that there are many moments to be killed at.
SLOW = """
import sys, time
from mlx_edge import convert, load
from mlx_edge.calibration import sensitivity
from mlx_edge.weights.stream_writer import StreamWriter
made, put = convert.make_request, StreamWriter.put
convert.make_request = lambda args: convert_small(made(args))
def convert_small(request):
    from dataclasses import replace
    return replace(request, max_shard_bytes=20000)
def slowly(self, *arguments):
    time.sleep(0.004)
    print("put", flush=True)
    put(self, *arguments)
StreamWriter.put = slowly
sys.exit(convert.main(sys.argv[1:]))
"""


def start_slowly(source, target):
    flags = ["--model", str(source), "--mlx-path", str(target), "-q", "--q-group-size", "32"]
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, *flags, "--no-receipt"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path):
    source = make_folder(tmp_path / "a")
    with start_slowly(source, tmp_path / "whole") as process:
        num_puts = process.communicate()[0].count("put")
    chance = random.Random(6)
    for _ in range(4):
        with start_slowly(source, tmp_path / "m") as process:
            for _ in range(chance.randrange(1, num_puts // 3)):
                process.stdout.readline()
            process.kill()
            process.communicate()
        assert not (tmp_path / "m").exists()
    with start_slowly(source, tmp_path / "m") as process:
        done = process.communicate()[0].count("put")
    assert process.returncode == 0
    assert read_weights(tmp_path / "m") == read_weights(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "m", "whole"]
    assert done <= num_puts


def test_ctrl_c_says_that_it_goes_on(tmp_path):
    with start_slowly(make_folder(tmp_path / "a"), tmp_path / "m") as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        said = process.communicate()[1]
    assert process.returncode == 130
    assert "the same command goes on from" in said and "Traceback" not in said


# The kernel's own count of this process: `ru_maxrss` begins with what the parent had.
MEASURED = """
import sys
from pathlib import Path
from mlx_edge.convert import main
code = main(sys.argv[1:])
status = Path("/proc/self/status").read_text()
print("peak", next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
sys.exit(code)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc for the peak of a process")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """Peaks of the command's process: four times the layers, less than two tensors more; 21 MB are packs alone."""
    rows, columns = 2048, 2048
    peaks = []
    for num_layers in (3, 12):
        folder = tmp_path / f"a{num_layers}"
        names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(num_layers)]
        write_checkpoint(folder, {n: mx.full((rows, columns), 0.5, mx.float16) for n in names})
        (folder / "config.json").write_text('{"model_type": "unheard"}')
        flags = ["--model", str(folder), "--mlx-path", str(tmp_path / f"m{num_layers}"), "-q"]
        said = subprocess.check_output(
            [sys.executable, "-c", MEASURED, *flags, "--no-receipt"], text=True
        )
        peaks.append(int(said.split()[-1]) * 1024)
    assert peaks[1] - peaks[0] < 2 * (2 * rows * columns)


def test_a_broken_request_ends_with_2_in_a_process_of_its_own(tmp_path):
    with start(tmp_path / "none", tmp_path / "m", "-q") as process:
        said = process.communicate()[1]
    assert process.returncode == 2
    assert len(said.splitlines()) == 1 and "no such folder" in said
