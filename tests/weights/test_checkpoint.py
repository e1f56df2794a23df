"""A folder is one set of names; whatever contradicts itself in it is refused with a line that says so."""

import json

import mlx.core as mx
import pytest

from mlx_edge.errors import ModelFormatError
from mlx_edge.weights import INDEX_NAME, Checkpoint, write_checkpoint, write_safetensors
from tests.weights.files import random_array, same

ARRAYS = {f"layers.{i}.w": random_array(mx.float16, (8, 16), seed=i) for i in range(5)}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_index(folder, weight_map):
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refuse(folder, words):
    with pytest.raises(ModelFormatError) as caught:
        Checkpoint.open(folder)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def check(folder, arrays):
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.names() == frozenset(arrays)
        for name, array in arrays.items():
            assert same(checkpoint.read(name), array)
            assert checkpoint.entry(name).shape == array.shape
        report = checkpoint.report
    num_bytes = sum(array.nbytes for array in arrays.values())
    assert (report.num_tensors, report.total_bytes) == (len(arrays), num_bytes)
    assert report.shared_bytes + report.copied_bytes == num_bytes


@pytest.fixture
def sharded(tmp_path):
    write_checkpoint(tmp_path, ARRAYS, max_shard_bytes=3 * 256)
    assert (tmp_path / SECOND).exists()
    return tmp_path


def test_one_file(tmp_path):
    write_checkpoint(tmp_path, ARRAYS)
    check(tmp_path, ARRAYS)


def test_shards_with_an_index(sharded):
    check(sharded, ARRAYS)


def test_shards_without_an_index(sharded):
    (sharded / INDEX_NAME).unlink()
    check(sharded, ARRAYS)


def test_files_that_are_links_into_a_cache(sharded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("snapshot")
    for path in sharded.iterdir():
        (folder / path.name).symlink_to(path)
    check(folder, ARRAYS)


def test_other_names_and_hidden_files(tmp_path):
    write_safetensors(tmp_path / "weights.safetensors", ARRAYS)
    (tmp_path / "._weights.safetensors").write_bytes(b"left by another system")
    check(tmp_path, ARRAYS)
    write_safetensors(tmp_path / "model-extra.safetensors", {"b": mx.zeros(3)})
    check(tmp_path, {"b": mx.zeros(3)})


def test_the_single_file_goes_before_others_without_an_index(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", ARRAYS)
    write_safetensors(tmp_path / "adapters.safetensors", {"b": mx.zeros(3)})
    check(tmp_path, ARRAYS)


def test_a_tensor_that_the_index_forgot_is_not_lost(sharded):
    names = sorted(ARRAYS)
    write_index(sharded, {names[0]: FIRST, names[-1]: SECOND})
    check(sharded, ARRAYS)


def test_missing_tensor(sharded):
    with Checkpoint.open(sharded) as checkpoint:
        for ask in (checkpoint.read, checkpoint.entry):
            with pytest.raises(ModelFormatError, match="no tensor 'lm_head' among 5"):
                ask("lm_head")


def test_metadata_is_what_all_files_agree_on(tmp_path):
    write_safetensors(tmp_path / FIRST, {"a": mx.zeros(1)}, metadata={"format": "mlx", "n": "1"})
    write_safetensors(tmp_path / SECOND, {"b": mx.zeros(1)}, metadata={"format": "mlx", "n": "2"})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.metadata == {"format": "mlx"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "broken JSON"),
        (b"\xff\xfe", "broken JSON"),
        (b"[]", "JSON of type list"),
        (b"[" * 100_000, "nested beyond reason"),
        (b"{}", "weight_map None"),
        (b'{"weight_map": {}}', "weight_map {}"),
        (b'{"weight_map": ["a"]}', "weight_map ['a']"),
        (b'{"weight_map": {"a": 1}}', "plain name"),
        (b'{"weight_map": {"a": "x", "a": "x"}}', "twice"),
    ],
)
def test_broken_index(sharded, text, words):
    (sharded / INDEX_NAME).write_bytes(text)
    refuse(sharded, words)


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..\\model.safetensors",
        "C:model.safetensors",
        ".hidden.safetensors",
        "model.safetensors\0",
        "a\nb.safetensors",
        "pytorch_model.bin",
        "..",
        "",
    ],
)
def test_index_may_only_name_plain_files_of_the_folder(sharded, shard):
    write_index(sharded, {"layers.0.w": shard})
    refuse(sharded, "the plain name of a .safetensors file")


def test_index_that_names_an_absent_shard(sharded):
    (sharded / SECOND).unlink()
    refuse(sharded, f"'{SECOND}' named but not in the folder")


def test_index_that_misplaces_a_tensor(sharded):
    names = sorted(ARRAYS)
    write_index(sharded, {names[0]: SECOND, names[-1]: SECOND})
    refuse(sharded, f"tensor '{names[0]}' mapped to '{SECOND}', which lacks it")


def test_a_tensor_in_two_shards(sharded):
    write_safetensors(sharded / SECOND, ARRAYS)
    refuse(sharded, f"in both {FIRST} and {SECOND}")


def test_a_broken_shard(sharded):
    path = sharded / SECOND
    path.write_bytes(path.read_bytes()[:-1])
    refuse(sharded, "truncated")


def test_incomplete_shards_without_an_index(sharded):
    (sharded / INDEX_NAME).unlink()
    (sharded / FIRST).unlink()
    refuse(sharded, f"found {SECOND} but not {FIRST}; expected all 2 shards")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.pth", "model-q4.gguf"])
def test_foreign_weights_are_named_and_never_opened(tmp_path, name):
    (tmp_path / name).write_bytes(b"not even a pickle")
    (tmp_path / name).chmod(0)
    (tmp_path / "config.json").write_text("{}")
    refuse(tmp_path, f"found {name}; expected model.safetensors; only safetensors are read")


def test_no_weights_and_no_folder(tmp_path):
    refuse(tmp_path, "found no weights")
    refuse(tmp_path / "absent", "no folder of this name")
    (tmp_path / "file").write_text("")
    refuse(tmp_path / "file", "no folder of this name")
