"""Texts to calibrate with: where they come from, how they are cut, and what is said when that fails."""

import itertools
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import HfApi, errors

from mlx_edge.calibration import dataset, documents
from mlx_edge.calibration.text import (
    BUILT_IN,
    cut_samples,
    read_text,
    split_held_out,
    spread,
)
from mlx_edge.errors import InvalidRequestError
from mlx_edge.text import load_tokenizer
from mlx_edge.weights.hub import find_model

ROOT = Path(__file__).parents[2]
LINES = "".join(f"line {i} of a text about the number {i * i}\n" for i in range(3000))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(find_model("pocket"))


def test_a_text_is_split_without_loss_and_by_itself_alone() -> None:
    kept, held = split_held_out(LINES)
    assert sorted((kept + held).splitlines()) == sorted(LINES.splitlines())
    assert not {*kept.splitlines()} & {*held.splitlines()}
    assert 0.18 < len(held) / len(LINES) < 0.22
    for text in ("", "a", "ab\ncd", "x" * 10_000, "\n" * 500, "ü\n" * 77):
        kept, held = split_held_out(text)
        assert sorted(kept + held) == sorted(text)


@pytest.mark.parametrize("length", [32, 100, 256])
def test_no_held_out_line_calibrates_whatever_the_length_and_seed(tokenizer, length) -> None:
    _, held = split_held_out(LINES)
    numbers = {line.split()[1] for line in held.splitlines()}
    held_rows = []
    for seed in (0, 1, 5):
        samples = cut_samples(tokenizer, LINES, "lines", num_rows=40, length=length, seed=seed)
        assert samples.calibration.rows.shape == (40, length)
        assert samples.held_out.rows.shape == (10, length)
        text = "|".join(tokenizer.decode(row, True) for row in samples.calibration.rows.tolist())
        found = set(re.findall(r"line (\d+) of a text", text))
        assert found and not found & numbers
        held_rows.append(samples.held_out.rows.tolist())
    assert held_rows[0] == held_rows[1] == held_rows[2]
    first, second = (
        cut_samples(tokenizer, LINES, "lines", length=length, seed=s).calibration.rows
        for s in (0, 1)
    )
    assert not np.array_equal(first, second)


def test_every_row_begins_as_a_text_does(tokenizer) -> None:
    samples = cut_samples(tokenizer, LINES, "lines", num_rows=8, length=64)
    for sample in (samples.calibration, samples.held_out):
        rows = np.array(sample.rows)
        assert (rows[:, 0] == tokenizer.bos_token_id).all()
        assert (rows[:, 1:] != tokenizer.bos_token_id).all()
    assert samples.calibration.sha256 == samples.held_out.sha256
    assert len(samples.held_out.sha256) == 64 and samples.held_out.num_tokens == 2 * 64


@pytest.mark.parametrize(("text", "total"), [("", 0), ("a few words", 11), (LINES[:2000], None)])
def test_a_short_text_is_told_what_it_needs(tokenizer, text, total) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        cut_samples(tokenizer, text, "notes.txt", length=512)
    message = str(caught.value)
    found, wanted = map(int, re.findall(r"(\d+) tokens, expected at least (\d+)", message)[0])
    assert found <= total if total is not None else found > 500
    assert wanted >= 5 * 512 and message.startswith("notes.txt: ")


@pytest.mark.parametrize("length", [16, 64])
def test_what_the_message_asks_for_is_enough(tokenizer, length) -> None:
    tokens = tokenizer.encode(LINES, add_special_tokens=False)
    for number in range(3 * length, 9 * length, 7):
        text = tokenizer.decode(tokens[:number])
        try:
            cut_samples(tokenizer, text, "x", length=length)
        except InvalidRequestError:
            assert number < 7 * length


def test_spread_is_even() -> None:
    assert spread(list(range(10)), 5) == [0, 2, 4, 6, 8]
    assert spread([1, 2], 5) == [1, 2]


def test_the_built_in_text_is_rich_and_free_of_test_items(tokenizer) -> None:
    text, name = read_text(BUILT_IN)
    assert name == BUILT_IN and 60_000 < len(text.encode()) < 120_000
    lines = [line for line in text.splitlines() if len(line) > 40]
    assert len({*lines}) >= 0.97 * len(lines)  # no filler
    assert len({*re.findall(r"[a-z]{3,}", text.lower())}) > 2500
    for word in (
        "def ",
        "SELECT",
        "\\int",
        "Antwort",
        "croustillante",
        "Respuesta",
        "答",
        "です",
        "<user>",
    ):
        assert word in text
    cut_samples(tokenizer, text, name)

    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import pocket_corpus
    finally:
        sys.path.pop(0)
    stream = itertools.islice(pocket_corpus.documents(31337), 130)
    trained = {
        (
            f"<s>{d.answer}</s>"
            if d.prompt is None
            else f"<s><user>{d.prompt}<assistant>{d.answer}</s>"
        )
        for d in stream
    }
    marked = [line for line in text.splitlines() if line.startswith("<s>")]
    assert len(marked) > 100 and {*marked} <= trained


def test_files_of_each_kind_are_read(tmp_path) -> None:
    plain, lines, whole = (tmp_path / f"text.{kind}" for kind in ("txt", "jsonl", "json"))
    plain.write_text("Grüße\n", "utf-8")
    lines.write_text('{"text": "one", "id": 3}\n\n"two"\n', "utf-8")
    whole.write_text(json.dumps([{"text": "three"}, "four"]), "utf-8")
    assert read_text(str(plain)) == ("Grüße\n", "text.txt")
    assert read_text(str(lines)) == ("one\n\ntwo", "text.jsonl")
    assert read_text(str(whole)) == ("three\n\nfour", "text.json")


def test_a_long_text_is_cut_and_its_name_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(documents, "MAX_CHARACTERS", 1 << 20)
    path = tmp_path / "long.txt"
    path.write_text("word " * 300_000)
    text, name = read_text(str(path))
    assert len(text) == 1 << 20 and name == "long.txt (first 1 Mi characters)"
    path = tmp_path / "long.jsonl"
    path.write_text('{"text": "word word word word"}\n' * 100_000 + "broken\n")
    assert len(read_text(str(path))[0]) == 1 << 20  # the broken line is never reached


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe", "a.txt: byte 0 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"te', "a.jsonl: line 2 is no JSON"),
        (
            "a.jsonl",
            b'{"prompt": "a", "answer": "b"}',
            "line 1 has fields prompt, answer; expected",
        ),
        ("a.json", b"[" * 100_000, "a.json is no JSON"),
        ("a.json", b"[3]", "entry 1 has no object; expected"),
    ],
)
def test_a_file_that_holds_no_text_is_said(tmp_path, name, content, message) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidRequestError) as caught:
        read_text(str(tmp_path / name))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source", ["none.txt", "a/b/c.txt", "", "\0", "x" * 5000, "../up", "a b/c"]
)
def test_what_is_neither_file_nor_data_set_is_said(source) -> None:
    with pytest.raises(InvalidRequestError, match=r"no such file|is a folder|no name of a file"):
        read_text(source)


class Hub:
    """Stands for the hub: a list of files with sizes, or an error."""

    def __init__(self, monkeypatch, tmp_path, files, error=None) -> None:
        self.asked: list[tuple[str, str]] = []
        siblings = [type("Entry", (), {"rfilename": n, "size": s})() for n, s in files.items()]

        def info(_self, name, **_):
            if error:
                raise error
            return type("Info", (), {"siblings": siblings})()

        def download(name, file, **options):
            assert options["repo_type"] == "dataset"
            if error:
                raise error
            self.asked.append((name, file))
            path = tmp_path / Path(file).name
            path.write_text('{"text": "from the hub"}' if path.suffix == ".jsonl" else "plain")
            return str(path)

        monkeypatch.setattr(HfApi, "dataset_info", info)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        ({"README.md": 9, "b.txt": 9, "a.jsonl": 9}, "b.txt"),
        ({"a/test.txt": 9, "a/train.jsonl": 9, "LICENSE.txt": 1}, "a/train.jsonl"),
        (
            {"train.txt": dataset.MAX_BYTES + 1, "small.json": 9, "dataset_infos.json": 1},
            "small.json",
        ),
    ],
)
def test_a_text_file_of_a_data_set_is_chosen(monkeypatch, tmp_path, files, chosen) -> None:
    hub = Hub(monkeypatch, tmp_path, files)
    _, name = dataset.fetch_text_file("owner/some-text")
    assert hub.asked == [("owner/some-text", chosen)] and name == f"owner/some-text:{chosen}"


def test_a_file_of_a_data_set_may_be_named(monkeypatch, tmp_path) -> None:
    hub = Hub(monkeypatch, tmp_path, {})
    assert read_text("owner/data:x/y.jsonl") == ("from the hub", "owner/data:x/y.jsonl")
    assert hub.asked == [("owner/data", "x/y.jsonl")]
    with pytest.raises(InvalidRequestError, match=r"owner/data:a.bin is none of .txt"):
        read_text("owner/data:a.bin")


def answer(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    return kind("said no", response=SimpleNamespace(headers={}, request=None))


def test_a_data_set_of_other_files_is_refused(monkeypatch, tmp_path) -> None:
    Hub(monkeypatch, tmp_path, {"data/train-0.parquet": 9, "README.md": 1, "big.txt": 1 << 40})
    with pytest.raises(InvalidRequestError, match=r"only .parquet, .txt; save some of its text"):
        read_text("owner/data")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        (answer(errors.RepositoryNotFoundError), "no such data set on the hub"),
        (answer(errors.GatedRepoError), "a gated data set; ask for access"),
        (answer(errors.RemoteEntryNotFoundError), "the data set has no file a.txt"),
        (ConnectionError("no route\nto host"), "the hub gives no data set: no route;"),
        (ValueError(""), "the hub gives no data set: ValueError;"),
    ],
)
def test_a_hub_that_does_not_answer_is_one_line(monkeypatch, tmp_path, error, message) -> None:
    Hub(monkeypatch, tmp_path, {}, error)
    with pytest.raises(InvalidRequestError) as caught:
        read_text("owner/data:a.txt")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InvalidRequestError, match=r"^owner/data: "):
        read_text("owner/data")
