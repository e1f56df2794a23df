"""The command as a user meets it: text, flags, pipes, and every kind of bad input in one line."""

import json
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from mlx_edge.generate import main
from mlx_edge.weights.hub import find_model

POCKET = find_model("pocket")
Run = Callable[..., str]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process; returns stdout, asserts the exit code."""

    def call(*arguments: str, code: int = 0) -> str:
        try:
            found = main(list(arguments))
        except SystemExit as exit_:
            found = exit_.code
        captured = capfd.readouterr()
        assert found == code, captured.err
        return captured.out if code == 0 else captured.err

    return call


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the bundled model, to be broken."""
    return Path(copytree(POCKET, tmp_path / "model"))


def test_quiet_output_is_the_text_alone(run: Run) -> None:
    text = run("--verbose", "False", "--max-tokens", "8")
    assert text.startswith("Once upon a time")
    assert "=====" not in text


def test_verbose_output_has_mlx_lms_lines(run: Run) -> None:
    lines = run("--max-tokens", "8").splitlines()
    assert lines[0] == lines[-5] == "=========="
    assert lines[-4].startswith("Prompt: ") and lines[-4].endswith("tokens-per-sec")
    assert lines[-3].startswith("Generation: 8 tokens, ")
    assert lines[-2].startswith("Peak memory: ") and lines[-2].endswith(" GB")
    assert lines[-1].startswith("Loaded: ") and " shared with the file, " in lines[-1]


def test_seed_replays_sampled_text(run: Run) -> None:
    sampled = ("--temp", "1.0", "--top-p", "0.95", "--max-tokens", "30", "--verbose", "False")
    first = run(*sampled, "--seed", "7")
    assert run(*sampled, "--seed", "7") == first
    assert run(*sampled, "--seed", "8") != first


def test_stop_string_ends_the_text_before_it(run: Run) -> None:
    whole = run("--verbose", "False", "--max-tokens", "40")
    word = whole.split()[7]
    assert run("--verbose", "False", "--stop", word) == whole[: whole.index(word)] + "\n"


def test_prefill_in_small_steps_gives_the_same_text(run: Run) -> None:
    arguments = ("--verbose", "False", "--max-tokens", "20")
    assert run(*arguments, "--prefill-step-size", "2") == run(*arguments)


def test_without_the_chat_template_the_prompt_is_continued(run: Run) -> None:
    text = run("--verbose", "False", "--ignore-chat-template", "--max-tokens", "12")
    assert text.strip()


def test_the_answer_begins_as_told(run: Run) -> None:
    arguments = ("--prompt", "open the maps app", "--verbose", "False")
    whole = run(*arguments).strip()
    assert run(*arguments, "--prefill-response", whole[:9]).strip() == whole[9:]


def test_extra_end_tokens_end_the_text(run: Run) -> None:
    from mlx_edge.text import load_tokenizer

    whole = run("--verbose", "False", "--max-tokens", "30")
    tokenizer = load_tokenizer(POCKET)
    last = tokenizer.id_to_token(tokenizer.encode(whole.strip(), add_special_tokens=False)[-1])
    assert last is not None
    shorter = run("--verbose", "False", "--max-tokens", "30", "--extra-eos-token", last)
    assert len(shorter) < len(whole) and whole.startswith(shorter.strip())


@pytest.mark.parametrize(
    "flags",
    [
        ("--max-kv-size", "300"),
        ("--kv-bits", "8", "--quantized-kv-start", "1000"),
    ],
    ids=["window beyond the text", "packed after the text"],
)
def test_memory_flags_that_do_not_bite_change_nothing(run: Run, flags: tuple[str, ...]) -> None:
    arguments = ("--verbose", "False", "--max-tokens", "40")
    assert run(*arguments, *flags) == run(*arguments)


def test_memory_flags_that_bite_still_write(run: Run) -> None:
    flags = ("--kv-bits", "4", "--kv-group-size", "32", "--quantized-kv-start", "0")
    assert run("--verbose", "False", "--max-tokens", "60", "--max-kv-size", "24", *flags).strip()


@pytest.mark.parametrize(
    "flags",
    [("--draft-model", "pocket-draft", "--num-draft-tokens", "5"), ("--prompt-lookup",)],
    ids=["draft model", "lookup"],
)
def test_drafts_change_no_text_and_are_counted(run: Run, flags: tuple[str, ...]) -> None:
    arguments = ("--temp", "0.7", "--seed", "3", "--max-tokens", "30")
    quiet = ("--verbose", "False")
    assert run(*arguments, *quiet, *flags) == run(*arguments, *quiet)
    line = next(x for x in run(*arguments, *flags).splitlines() if x.startswith("Drafts: "))
    assert re.fullmatch(r"Drafts: \d+ of \d+ accepted, \d+\.\d\d tokens per forward pass", line)


def test_a_draft_model_with_another_vocabulary_is_one_line(run: Run, tmp_path: Path) -> None:
    folder = Path(copytree(find_model("pocket-draft"), tmp_path / "draft"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[400:402]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    error = run("--draft-model", str(folder), code=2)
    assert repr(first) in error and repr(second) in error and str(folder) in error


def test_lookup_finds_what_a_prompt_cache_holds(run: Run, tmp_path: Path) -> None:
    from mlx_edge.cache_prompt import main as cache_prompt

    path = str(tmp_path / "prompt.safetensors")
    story = "Once upon a time, there was a little fox who had a red ball. "
    raw = ("--ignore-chat-template", "--prompt")
    assert cache_prompt([*raw, story * 3, "--prompt-cache-file", path]) == 0
    arguments = (*raw, "Once upon a time", "--prompt-cache-file", path, "-m", "20")
    text = run(*arguments, "--prompt-lookup")
    accepted = int(re.search(r"Drafts: (\d+) of", text)[1])  # type: ignore[index]
    assert accepted > 0
    assert text.split("==========")[1] == run(*arguments).split("==========")[1]


def test_text_follows_a_grammar(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="needs the extra grammar")
    schema = tmp_path / "schema.json"
    schema.write_text(
        '{"type": "object", "properties": {"n": {"enum": [7, 8]}}, "required": ["n"], '
        '"additionalProperties": false}'
    )
    assert json.loads(run("--verbose", "False", "--json-schema", str(schema)))["n"] in (7, 8)
    assert run("--verbose", "False", "--regex", "(yes|no)!").strip() in ("yes!", "no!")
    assert run("--verbose", "False", "--lark", 'start: "a" "b"').strip() == "ab"
    assert run("--verbose", "False", "--grammar", 'start: "a" "b"').strip() == "ab"
    order = ("--prompt", "call Zorvan", "--grammar", "autoglm", "--verbose", "False")
    assert run(*order).strip().startswith("do(action=")


@pytest.mark.parametrize("level", ["phases", "ops"])
def test_profile_says_where_the_time_went(run: Run, tmp_path: Path, level: str) -> None:
    trace = tmp_path / "trace.json"
    text = run("--max-tokens", "5", "--profile", level, "--profile-out", str(trace))
    for phase in ("load", "tokenise", "prefill", "decode", "sample", "detokenise"):
        assert f"\n{phase} " in text
    assert "Cost of observing: " in text
    assert ("\nattention_block " in text) == (level == "ops")
    assert json.loads(trace.read_text())["traceEvents"]


def test_prompt_from_stdin() -> None:
    command = [
        sys.executable,
        "-m",
        "mlx_edge.generate",
        "--prompt",
        "-",
        "--verbose",
        "False",
        "-m",
        "9",
    ]
    found = subprocess.run(
        command, input="Once upon a time", capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith("Once upon a time")
    broken = subprocess.run(command, input=b"\xff\xfe", capture_output=True, check=False)
    assert broken.returncode == 2
    assert b"not UTF-8" in broken.stderr


def test_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m mlx_edge.generate | head -c 12; exit ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", command], capture_output=True, check=False)
    assert (found.returncode, found.stderr) == (0, b"")


def test_interrupt_is_quiet() -> None:
    for _ in range(5):  # on a busy machine the text may end before the signal comes
        process = subprocess.Popen(
            [sys.executable, "-m", "mlx_edge.generate", "--temp", "2", "--seed", "1", "-m", "500"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert process.stdout is not None and process.stdout.readline() == b"==========\n"
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        if process.returncode != 0:
            break
    assert process.returncode == 130
    assert errors.strip() == b""


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--max-tokens", "0"], "'0' is not a whole number from 1"),
        (["--max-tokens", "1e9"], "'1e9' is not a whole number"),
        (["--temp", "-1"], "'-1' is not a number from 0"),
        (["--temp", "nan"], "'nan' is not a number"),
        (["--top-p", "1.5"], "'1.5' is not a number from 0 to 1"),
        (["--top-p", "0"], "expected above 0"),
        (["--top-k", "-1"], "'-1' is not a whole number from 0"),
        (["--seed", "x"], "'x' is not a whole number"),
        (["--verbose", "maybe"], "neither true nor false"),
        (["--stop", ""], "stop"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--max-tok", "5"], "--max-tok"),
        (["--kv-bits", "5"], "5 bits in groups of 64; expected bits of 4 or 8"),
        (
            ["--kv-bits", "4", "--kv-group-size", "128", "--quantized-kv-start", "0"],
            "heads of 64 do not divide",
        ),
        (["--max-kv-size", "4"], "'4' is not a whole number from 5"),
        (["--xtc-probability", "2"], "'2' is not a number from 0 to 1"),
        (["--chat-template-config", "[1]"], "must be an object"),
        (["--chat-template-config", "{"], "is not JSON"),
        (["--chat-template-config", '{"tokenize": true}'], "sets tokenize"),
        (["--system-prompt", "x", "--ignore-chat-template"], "need a chat template"),
        (["--extra-eos-token", "no such token"], "is no token of this vocabulary"),
        (["--profile-out", "x.json"], "needs --profile"),
        (["--regex", "a", "--lark", "b"], "not allowed with"),
        (["--regex", "("], "regex"),
        (["--json-schema", "{"], "JSON"),
        (["--json-schema", '{"type": "nothing"}'], "schema"),
        (["--draft-model", "pocket-draft", "--prompt-lookup"], "not allowed with"),
        (["--draft-model", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["--num-draft-tokens", "3"], "nothing drafts"),
        (["--prompt-lookup", "--num-draft-tokens", "0"], "'0' is not a whole number from 1 to 15"),
        (["--model", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["--model", ""], "no such folder"),
        (["--model", str(POCKET / "config.json")], "is a file"),
        (["--prompt", "word " * 5000], "the model's context"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_bad_flags_are_one_line(run: Run, arguments: list[str], named: str) -> None:
    error = run(*arguments, code=2)
    assert named in error
    assert error.startswith("mlx_edge.generate: error: ")
    assert error.count("\n") == 1


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def edit_header(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        edit(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return change


def replace_bytes(name: str, make: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(make((folder / name).read_bytes()))

    return change


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def move_over_another(header: dict[str, Any]) -> None:
    first, second = (name for name in list(header)[1:3])
    header[second]["data_offsets"] = header[first]["data_offsets"]
    header[second]["shape"] = header[first]["shape"]


NORM = "model.norm.weight"
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "unknown model type": (
        edit_config(model_type="mamba"),
        "'mamba' is not one of those defined here",
    ),
    "no heads": (edit_config(num_attention_heads=0), "num_attention_heads is 0"),
    "string for number": (edit_config(hidden_size="256"), "hidden_size is '256'"),
    "999 layers": (edit_config(num_hidden_layers=999), "num_hidden_layers is 999"),
    "more layers": (edit_config(num_hidden_layers=99), "is missing"),
    "fewer layers": (edit_config(num_hidden_layers=1), "does not use"),
    "no config": (remove("config.json"), "config.json is missing"),
    "no weights": (remove("model.safetensors"), "safetensors"),
    "truncated": (replace_bytes("model.safetensors", lambda b: b[:-1000]), "truncated"),
    "cut header": (replace_bytes("model.safetensors", lambda b: b[:100]), "model.safetensors"),
    "empty weights": (replace_bytes("model.safetensors", lambda _: b""), "model.safetensors"),
    "oversized header": (
        replace_bytes("model.safetensors", lambda b: struct.pack("<Q", 1 << 62) + b[8:]),
        "header",
    ),
    "overlapping": (edit_header(move_over_another), "overlap"),
    "wrong dtype": (edit_header(lambda h: h[NORM].update(dtype="I16")), f"tensor {NORM} is I16"),
    "unknown dtype": (edit_header(lambda h: h[NORM].update(dtype="F17")), "F17"),
    "wrong shape": (edit_header(lambda h: h[NORM].update(shape=[1, *h[NORM]["shape"]])), NORM),
    "wrong size": (edit_header(lambda h: h[NORM].update(shape=[3])), NORM),
    "huge shape": (edit_header(lambda h: h[NORM].update(shape=[1 << 62, 1 << 62])), NORM),
    "extra tensor": (
        edit_header(lambda h: h.update({"extra": h.pop(NORM)})),
        f"tensor {NORM} is missing",
    ),
    "no tokenizer": (remove("tokenizer.json", "tokenizer.model"), "tokenizer"),
    "broken tokenizer": (
        replace_bytes("tokenizer.json", lambda b: b[: len(b) // 2]),
        "tokenizer.json",
    ),
    "garbage tokenizer": (
        replace_bytes("tokenizer.json", lambda _: b'{"model": 3}'),
        "tokenizer.json",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_folders_are_one_line(run: Run, model: Path, kind: str) -> None:
    change, named = BROKEN[kind]
    change(model)
    error = run("--model", str(model), code=2)
    assert named in error
    assert error.startswith("mlx_edge.generate: error: ")
    assert error.count("\n") == 1


def test_code_and_pickles_in_a_folder_are_never_touched(
    run: Run, model: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "executed"
    code = f"from pathlib import Path; Path({str(trace)!r}).touch()"
    (model / "modeling_llama.py").write_text(code)
    (model / "pytorch_model.bin").write_bytes(b"cbuiltins\nexec\n(V" + code.encode() + b"\ntR.")
    edit_config(model_file="modeling_llama.py", auto_map={"AutoModel": "modeling_llama.M"})(model)
    run("--model", str(model), "--max-tokens", "3", code=2)  # model_file is named and refused
    edit_config(model_file=None)(model)
    run("--model", str(model), "--max-tokens", "3")
    assert not trace.exists()


def test_help_loads_no_mlx() -> None:
    program = (
        "import sys; from mlx_edge.generate import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('mlx.core' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
