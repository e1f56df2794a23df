"""Saved prompts, from the library and from the command line: continued bit for bit, or refused in one line."""

import errno
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_edge import generate as generate_text_of
from mlx_edge.cache import KVCache, QuantizedRows
from mlx_edge.cache_prompt import main as cache_main
from mlx_edge.errors import InvalidRequestError, MLXEdgeError, ModelFormatError
from mlx_edge.generate import main as generate_main
from mlx_edge.models.decoder import Decoder
from mlx_edge.models.load import load, load_model
from mlx_edge.models.prompt_cache import (
    describe_prompt,
    fingerprint_model,
    load_prompt_cache,
    save_prompt_cache,
)
from mlx_edge.text import Tokenizer
from mlx_edge.weights import SafetensorsFile, write_safetensors
from mlx_edge.weights.hub import find_model
from tests.models.tiny import CONFIGS

POCKET = find_model("pocket")
Run = Callable[..., str]
LAYER: dict[str, tuple[int, ...]] = {
    **{f"self_attn.{name}_proj": (128 if name == "q" else 64, 64) for name in "qkv"},
    "self_attn.o_proj": (64, 128),
    **{f"mlp.{name}_proj": (96, 64) for name in ("gate", "up")},
    "mlp.down_proj": (64, 96),
    "input_layernorm": (64,),
    "post_attention_layernorm": (64,),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, some of whose layers see a window."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(CONFIGS["windows"]))
    mx.random.seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (131, 64),
        "lm_head": (131, 64),
        "model.norm": (64,),
    }
    for layer in range(3):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in LAYER.items()}
    write_safetensors(
        folder / "model.safetensors",
        {f"{name}.weight": 0.3 * mx.random.normal(shape) for name, shape in shapes.items()},
    )
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Decoder:
    return load_model(folder)


@pytest.fixture
def saved(model: Decoder, tmp_path: Path) -> Path:
    """A sound file."""
    return save(model, tmp_path / "prompt.safetensors")


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; returns stdout, or the one line on stderr."""

    def call(main: Callable[[list[str]], int], *arguments: str, code: int = 0) -> str:
        try:
            found = main(list(arguments))
        except SystemExit as exit_:
            found = exit_.code
        captured = capfd.readouterr()
        assert found == code, captured.err
        assert code == 0 or captured.err.count("\n") == 1
        return captured.out if code == 0 else captured.err

    return call


def save(model: Decoder, path: Path) -> Path:
    tokens = list(range(1, 71))
    caches = model.make_cache(max_kv_size=30)
    model(mx.array([tokens]), caches)
    save_prompt_cache(path, caches, describe_prompt(model, [tokens], name="it"))
    return path


def logits(model: Decoder, tokens: list[list[int]], caches: list[KVCache]) -> list[np.ndarray]:
    """Those of the last token of each row; padding is stored nowhere."""
    lengths = [len(row) for row in tokens]
    width = max(lengths)
    padded = mx.array([row + [0] * (width - len(row)) for row in tokens])
    found = np.array(model(padded, caches, lengths=lengths).astype(mx.float32))
    mx.eval([array for cache in caches for array in cache.arrays])
    return [found[row, length - 1] for row, length in enumerate(lengths)]


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "limited": {"max_kv_size": 30},
    "limited above a window": {"max_kv_size": 9},
    "8 bit": {"row_format": QuantizedRows(8, 32)},
    "4 bit limited": {"row_format": QuantizedRows(4, 32), "max_kv_size": 30},
    "float until later": {"row_format": QuantizedRows(8, 32), "float_until": 100},
}
LENGTHS = {"one": [70], "short": [3], "ragged": [3, 90, 33]}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_continuation_is_bit_equal(
    model: Decoder, tmp_path: Path, kind: str, lengths: list[int]
) -> None:
    path = tmp_path / "prompt"
    prompt = [[(7 * i + row) % 131 for i in range(n)] for row, n in enumerate(lengths)]
    caches, never_saved = model.make_cache(**KINDS[kind]), model.make_cache(**KINDS[kind])
    logits(model, prompt, never_saved)
    logits(model, prompt, caches)
    save_prompt_cache(path, caches, describe_prompt(model, prompt) | {"note": "mine"})
    loaded, metadata = load_prompt_cache(path, model, return_metadata=True)
    assert json.loads(metadata["tokens"]) == prompt
    assert metadata["note"] == "mine"
    for new in ([1, 2, 3], list(range(50)), [5]):
        tokens = [new] * len(lengths)
        wanted = logits(model, tokens, never_saved)
        for other in (loaded, caches):
            assert all(map(np.array_equal, logits(model, tokens, other), wanted))


def test_only_held_rows_are_stored(model: Decoder, tmp_path: Path) -> None:
    caches = model.make_cache(5000)
    model(mx.array([[1, 2, 3]]), caches)
    save_prompt_cache(tmp_path / "p", caches, describe_prompt(model, [[1, 2, 3]]))
    with SafetensorsFile(tmp_path / "p") as file:
        stored = sum(entry.num_bytes for entry in file.tensors.values())
    config = model.config
    assert stored == config.num_layers * 2 * config.num_kv_heads * 3 * config.head_dim * 4


def test_another_fine_tune_of_the_same_shape_is_noticed(
    folder: Path, model: Decoder, saved: Path, tmp_path: Path
) -> None:
    weights = dict(mx.load(str(folder / "model.safetensors")))
    for name in ("model.layers.2.self_attn.q_proj.weight", "model.norm.weight"):
        other = copytree(folder, tmp_path / name)
        changed = weights | {name: weights[name] * 1.001}
        write_safetensors(other / "model.safetensors", changed)
        with pytest.raises(
            InvalidRequestError, match=r"with another model \('it'\), other weights"
        ):
            load_prompt_cache(saved, load_model(other))
    assert fingerprint_model(load_model(folder)) == fingerprint_model(model)


def test_another_configuration_is_noticed(folder: Path, saved: Path, tmp_path: Path) -> None:
    other = copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 10001.0}))
    with pytest.raises(InvalidRequestError, match="another model"):
        load_prompt_cache(saved, load_model(other))


def rewrite(path: Path, edit: Callable[[dict[str, mx.array], dict[str, str]], Any]) -> None:
    """Edit tensors and metadata of a file, in place."""
    with SafetensorsFile(path) as file:
        tensors = {name: mx.array(file.read(name)) for name in file.tensors}
        metadata = dict(file.metadata)
    edit(tensors, metadata)
    write_safetensors(path, tensors, metadata=metadata)


def edit_fact(**changes: Any) -> Callable[[dict[str, mx.array], dict[str, str]], None]:
    """Change facts of all layers."""

    def edit(_: dict[str, mx.array], metadata: dict[str, str]) -> None:
        layers = [layer | changes for layer in json.loads(metadata["caches"])]
        metadata["caches"] = json.dumps(layers)

    return edit


def edit_metadata(**changes: str) -> Callable[[dict[str, mx.array], dict[str, str]], None]:
    return lambda _, metadata: metadata.update(changes)


TAIL0 = "layers.0.rows.0.tail.0"
HOSTILE: dict[str, tuple[Callable[[dict[str, mx.array], dict[str, str]], Any], str]] = {
    "other format": (edit_metadata(format="mlx"), "no prompt cache of mlx_edge"),
    "newer format": (edit_metadata(format_version="2"), "format version '2', written by"),
    "no tokens": (lambda _, m: m.pop("tokens"), "lacks tokens"),
    "tokens beyond the vocabulary": (edit_metadata(tokens=str([[131] * 70])), "other tokens"),
    "fewer tokens": (edit_metadata(tokens="[[1]]"), "other tokens"),
    "tokens of no kind": (edit_metadata(tokens="[" * 100000), "other tokens"),
    "facts of no kind": (edit_metadata(caches="{"), "not JSON"),
    "facts that are no list": (edit_metadata(caches="7"), "no list"),
    "no layer": (edit_metadata(caches="[]"), "it has 0 layers, the model 3"),
    "layers of words": (edit_metadata(caches='["a", "b", "c"]'), "other keys than"),
    "missing tensor": (lambda t, _: t.pop(TAIL0), f"tensor {TAIL0} is missing"),
    "tensor too many": (lambda t, _: t.update(x=mx.zeros(3)), "1 tensors belong to nothing"),
    "wrong shape": (lambda t, _: t.update({TAIL0: mx.zeros((2, 1, 2, 7, 32))}), TAIL0),
    "wrong type": (lambda t, _: t.update({TAIL0: t[TAIL0].astype(mx.int32)}), f"{TAIL0} is I32"),
    "other window": (edit_fact(window=27), "windows are not those"),
    "no room in the window": (edit_fact(window=1, keep=1), "window with the kept positions is 2"),
    "beyond the context": (edit_fact(offsets=[513]), "513 positions, the model's context 512"),
    "other offset": (edit_fact(offsets=[71]), "other tokens"),
    "packed in no way": (edit_fact(packed=[5, 32]), "5 bits"),
    "packed rows that are floats": (edit_fact(packed=[8, 32], is_float=False), "expected U32"),
    "groups that do not divide": (edit_fact(packed=[8, 64], is_float=False), "do not divide"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_files_that_do_not_fit_are_refused(model: Decoder, saved: Path, kind: str) -> None:
    edit, named = HOSTILE[kind]
    rewrite(saved, edit)
    with pytest.raises(ModelFormatError) as caught:
        load_prompt_cache(saved, model)
    assert named in str(caught.value)
    assert str(saved) in str(caught.value) and "make it again" in str(caught.value)


def test_layers_that_differ_are_refused(model: Decoder, saved: Path) -> None:
    def edit(_: dict[str, mx.array], metadata: dict[str, str]) -> None:
        layers = json.loads(metadata["caches"])
        layers[1]["offsets"] = [3]
        metadata["caches"] = json.dumps(layers)

    rewrite(saved, edit)
    with pytest.raises(ModelFormatError, match="layers differ in format or length"):
        load_prompt_cache(saved, model)


def test_broken_bytes_are_refused_or_harmless(model: Decoder, saved: Path) -> None:
    content = saved.read_bytes()
    chance = random.Random(0)
    for length in (0, 7, 8, 100, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:length])
        with pytest.raises(ModelFormatError):
            load_prompt_cache(saved, model)
    used = content.rindex(b"}", 0, 16384)
    for _ in range(100):
        broken = bytearray(content)
        for _ in range(chance.choice((1, 1, 8))):
            broken[chance.randrange(used)] = chance.randrange(256)
        saved.write_bytes(broken)
        try:
            load_prompt_cache(saved, model)  # a digit of the metadata's version, say
        except MLXEdgeError as error:
            assert "\n" not in str(error)


def test_what_is_no_file_is_refused(model: Decoder, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ModelFormatError):
            load_prompt_cache(path, model)


def test_metadata_must_belong_to_the_caches(model: Decoder, tmp_path: Path) -> None:
    caches, path = model.make_cache(), tmp_path / "p"
    with pytest.raises(InvalidRequestError, match="more than none"):
        save_prompt_cache(path, caches, describe_prompt(model, [[]]))
    model(mx.array([[1, 2, 3]]), caches)
    with pytest.raises(InvalidRequestError, match="both must be alike"):
        save_prompt_cache(path, caches, describe_prompt(model, [[1, 2]]))
    with pytest.raises(InvalidRequestError, match="describe_prompt"):
        save_prompt_cache(path, caches, {})
    with pytest.raises(InvalidRequestError, match="may not set"):
        described = describe_prompt(model, [[1, 2, 3]])
        save_prompt_cache(path, caches, described | {"format": "x"})
    assert not path.exists()


def test_full_disk_leaves_the_older_file(
    model: Decoder, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    older = saved.read_bytes()
    monkeypatch.setattr("mlx_edge.weights.writer.os.fsync", refuse)
    with pytest.raises(InvalidRequestError, match="No space left"):
        save(model, saved)
    assert saved.read_bytes() == older
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.fixture(scope="module")
def pocket() -> tuple[Decoder, Tokenizer]:
    return load()


STORY, QUESTION = "Once upon a time there was a cat. ", "\nWhat was there? <user> "


@pytest.mark.parametrize("flags", [(), ("--ignore-chat-template",)], ids=["template", "raw"])
@pytest.mark.parametrize(
    "memory",
    [(), ("--max-kv-size", "12"), ("--kv-bits", "8", "--quantized-kv-start", "3")],
    ids=["plain", "limited", "packed"],
)
def test_continued_text_is_that_of_the_whole_prompt(
    run: Run,
    pocket: tuple[Decoder, Tokenizer],
    tmp_path: Path,
    flags: tuple[str, ...],
    memory: tuple[str, ...],
) -> None:
    path = str(tmp_path / "p.safetensors")
    stored = ("--prompt", STORY, "--prompt-cache-file", path, *memory, *flags)
    lines = run(cache_main, *stored, "--prefill-step-size", "5").splitlines()
    assert lines[0].startswith("Processed ") and lines[-1].startswith("Saved: ")
    rest = ("--prompt", QUESTION, "--prompt-cache-file", path, "--max-tokens", "10")
    found = run(generate_main, *rest, *flags, "--verbose", "False")
    model, tokenizer = pocket
    if flags:
        parts = [tokenizer.encode(STORY), tokenizer.encode(QUESTION, add_special_tokens=False)]
    else:
        texts = (f"<s><user>{STORY}", f"{QUESTION}<assistant>")
        parts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    options: dict[str, Any] = {
        "--max-kv-size": {"max_kv_size": 12},
        "--kv-bits": {"row_format": QuantizedRows(8, 64), "float_until": 3},
    }.get(memory[0] if memory else "", {})
    caches = model.make_cache(**options)
    model(mx.array([parts[0]]), caches)
    wanted = generate_text_of(model, tokenizer, parts[1], max_tokens=10, prompt_cache=caches)
    assert found == wanted + "\n"


@pytest.fixture(scope="module")
def pocket_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("pocket") / "p.safetensors")
    assert cache_main(["--prompt", "open the", "--prompt-cache-file", path]) == 0
    return path


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--max-kv-size", "30"], "--max-kv-size does not go with --prompt-cache-file"),
        (["--kv-bits", "8"], "--kv-bits does not go"),
        (["--kv-group-size", "32"], "--kv-group-size does not go"),
        (["--quantized-kv-start", "1"], "--quantized-kv-start does not go"),
        (["--system-prompt", "x"], "--system-prompt does not go"),
        (["--ignore-chat-template"], "leave out --ignore-chat-template"),
        (["--model", "pocket-draft"], "another model ('pocket')"),
        (["--prompt", "word " * 500], "the model's context"),
        (["--prompt-cache-file", "/no/such"], "/no/such"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_bad_flags_are_one_line(
    run: Run, pocket_file: str, arguments: list[str], named: str
) -> None:
    assert named in run(generate_main, "--prompt-cache-file", pocket_file, *arguments, code=2)


def test_another_template_is_one_line(run: Run, pocket_file: str, tmp_path: Path) -> None:
    folder = copytree(POCKET, tmp_path / "model")
    flags = ("--prompt-cache-file", pocket_file, "--model", str(folder), "--max-tokens", "2")
    run(generate_main, *flags)  # the same model elsewhere
    (folder / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    assert "another chat template" in run(generate_main, *flags, code=2)


def test_profile_continues_the_same_prompt_each_time(run: Run, pocket_file: str) -> None:
    flags = ("--prompt-cache-file", pocket_file, "--prompt", " maps app", "--max-tokens", "3")
    assert "do(action" in run(generate_main, *flags, "--profile")


def test_model_folder_is_found_again_from_elsewhere(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copytree(POCKET, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    run(cache_main, "--model", "model", "--prompt", "open the", "--prompt-cache-file", "p")
    monkeypatch.chdir("/")
    run(generate_main, "--prompt-cache-file", str(tmp_path / "p"), "--max-tokens", "2")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--prompt-cache-file", "/no/such/folder/p"], "in a folder that exists"),
        (["--prompt-cache-file", "/tmp"], "expected the name of a file"),
        (["--prompt", "word " * 500], "the model's context"),
        (["--max-kv-size", "4"], "'4' is not a whole number from 5"),
        (["--kv-bits", "5"], "5 bits in groups of 64"),
        (["--system-prompt", "x", "--ignore-chat-template"], "need a chat template"),
        (["--chat-template-config", "{"], "is not JSON"),
        (["--temp", "1"], "--temp"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_bad_flags_of_caching_are_one_line(
    run: Run, tmp_path: Path, arguments: list[str], named: str
) -> None:
    path = tmp_path / "p"
    flags = ("--prompt", "x", "--prompt-cache-file", str(path), *arguments)
    assert named in run(cache_main, *flags, code=2)
    assert not path.exists()
