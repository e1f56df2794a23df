"""Models that see, text and images together: logits against transformers', and the same however a prompt is read."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_edge import ops
from mlx_edge.cache import QuantizedRows
from mlx_edge.decoding.batch import batch_generate
from mlx_edge.decoding.loop import generate_step
from mlx_edge.decoding.proposers import make_proposer
from mlx_edge.decoding.speculation import speculative_generate_step
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.decoder import Decoder
from mlx_edge.models.interface import run_sequences
from mlx_edge.models.load import load_model
from mlx_edge.models.prompt_cache import describe_prompt, save_prompt_cache
from mlx_edge.models.vision.prompt import ImagePrompt, encode_images, place_images
from mlx_edge.text import load_tokenizer
from tests.models.vision.folders import (
    CASES,
    FAMILIES,
    draw_images,
    placed_once,
    read_golden,
    relative_difference,
    write_model,
    write_tokenizer,
)

TOLERANCE = 1e-4
ALIKE = 1e-5
IMAGE = 60
Load = Callable[[str], Decoder]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: write_tokenizer(write_model(family, root / family)) for family in FAMILIES}


@pytest.fixture(scope="module", params=["reference", "auto"])
def load(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[Load]:
    """Models of plain MLX, and of the kernels that this machine has."""
    if request.param == "auto" and not ops.uses_cpu_kernels():
        pytest.skip("the CPU kernels are not built here; plain MLX is tested beside this")
    with ops.use("reference" if request.param == "reference" else "cpu"):
        models = {family: load_model(folders[family]) for family in FAMILIES}
    if request.param == "reference":
        with ops.use("reference"):
            yield models.__getitem__
    else:
        yield models.__getitem__


def place(model: Decoder, case: str) -> ImagePrompt:
    assert model.vision is not None
    config = model.vision.config
    tokens = placed_once(config.model_type, case, IMAGE)
    return place_images(tokens, draw_images(config.model_type, case, config), config)


def read(model: Decoder, prompt: ImagePrompt, sizes: list[int], **options: Any) -> np.ndarray:
    """The logits (L, V) of the prompt, given in steps of these sizes, the last of them again and again."""
    cache = model.make_cache(**options)
    parts, begin = [], 0
    while begin < len(prompt.tokens):
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        own = mx.array([prompt.tokens[begin : begin + size]])
        parts.append(model(own, cache, images=prompt)[0])
        begin += size
    return np.array(mx.concatenate(parts))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_what_follows_equal_transformers(load: Load, family: str, case: str) -> None:
    model, golden = load(family), read_golden(family)["cases"][case]
    prompt = place(model, case)
    found = read(model, prompt, [1000])[golden["positions"]]
    assert relative_difference(found, golden["logits"]) < TOLERANCE
    steps = generate_step(
        mx.array(prompt.tokens), model, max_tokens=len(golden["greedy"]), images=prompt
    )
    assert [token for token, _ in steps] == golden["greedy"]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_do_not_depend_on_where_a_prompt_was_cut(load: Load, family: str) -> None:
    model = load(family)
    prompt = place(model, "three")
    whole = read(model, prompt, [1000])
    tolerance = ALIKE if model.row_exactness else 0.0  # the CPU kernels promise the very bits
    for size in (1, 2, 3, 5, 7, 11, 32, 33):
        assert relative_difference(read(model, prompt, [size]), whole) <= tolerance, size
    first = prompt.spans[0]
    for end in (first.start, first.start + 1, first.end - 1, first.end, first.end + 1):
        assert relative_difference(read(model, prompt, [end, 1000]), whole) <= tolerance, end


@pytest.mark.parametrize(
    "options",
    [
        {"max_kv_size": 24},
        {"row_format": QuantizedRows(8, 32)},
        {"row_format": QuantizedRows(8, 32), "float_until": 8},
    ],
    ids=["rotating", "packed", "packed later"],
)
def test_every_cache_holds_images(load: Load, options: dict[str, Any]) -> None:
    model = load("glm4v")
    prompt = place(model, "three")
    cut = min(options.get("float_until", 1000), 1000)
    sizes = [[cut, 1000]] + [[*[1] * cut, size] for size in (1, 3)] if cut < 1000 else [[9], [1]]
    whole, *others = (read(model, prompt, size, **options) for size in sizes)
    for other in others:
        assert relative_difference(other, whole) < ALIKE
    # It is another result than all floats give, and near it where nothing was dropped.
    difference = relative_difference(whole, read(model, prompt, [1000]))
    assert difference > 1e-4 and (difference < 0.1 or "max_kv_size" in options)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fork_goes_on_as_the_whole(load: Load, family: str) -> None:
    model = load(family)
    prompt = place(model, "three")
    whole = read(model, prompt, [1000])
    cache = model.make_cache()
    tokens = mx.array([prompt.tokens])
    model(tokens, cache, images=prompt)
    for length in (prompt.spans[1].start + 1, prompt.spans[1].end, len(prompt.tokens) - 3):
        twin = [layer.fork(length) for layer in cache]
        found = model(tokens[:, length:], twin, images=prompt)[0]
        assert relative_difference(found, whole[length:]) < ALIKE


def test_many_sequences_in_a_step_have_the_logits_of_each_alone(load: Load) -> None:
    model = load("glm4v")
    prompts = [place(model, "one"), None, place(model, "three")]
    texts = [prompt.tokens if prompt else [5, 6, 7, 8, 9] for prompt in prompts]
    caches = [model.make_cache() for _ in prompts]
    alone = [
        np.array(model(mx.array([tokens]), images=prompt)[0])
        for tokens, prompt in zip(texts, prompts, strict=True)
    ]
    done = [0, 0, 0]
    while any(count < len(text) for count, text in zip(done, texts, strict=True)):
        active = [i for i in range(3) if done[i] < len(texts[i])]
        lengths = [min(7 + i, len(texts[i]) - done[i]) for i in active]
        tokens = [t for i, n in zip(active, lengths, strict=True) for t in texts[i][done[i] :][:n]]
        logits = np.array(
            run_sequences(
                model,
                mx.array(tokens),
                [caches[i] for i in active],
                lengths,
                lengths,
                [prompts[i] for i in active],
            )
        )
        row = 0
        for i, n in zip(active, lengths, strict=True):
            wanted = alone[i][done[i] : done[i] + n]
            assert relative_difference(logits[row : row + n], wanted) < ALIKE
            done[i], row = done[i] + n, row + n


@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_behind_images_change_nothing(load: Load, family: str) -> None:
    model = load(family)
    prompt = place(model, "three")
    tokens = mx.array(prompt.tokens)
    choices: list[dict[str, Any]] = [{"prompt_lookup": True}, {"draft_model": model}]
    for options in choices:
        proposer = make_proposer(model, **options)
        assert proposer is not None
        steps = speculative_generate_step(tokens, model, proposer, max_tokens=12, images=prompt)
        assert [step.token for step in steps] == read_golden(family)["cases"]["three"]["greedy"]


@pytest.mark.parametrize("size", [1, 5, 17])
def test_the_loop_reads_images_in_chunks(load: Load, size: int) -> None:
    model = load("qwen2_5_vl")
    prompt = place(model, "three")
    steps = generate_step(
        mx.array(prompt.tokens), model, max_tokens=12, images=prompt, prefill_step_size=size
    )
    assert [t for t, _ in steps] == read_golden("qwen2_5_vl")["cases"]["three"]["greedy"]


def test_features_are_computed_once_and_only_where_they_are_read(load: Load) -> None:
    model = load("glm4v")
    prompt = place(model, "three")
    tokens = mx.array([prompt.tokens])
    first, second, _ = prompt.spans
    cache = model.make_cache()
    model(tokens[:, : first.start], cache, images=prompt)
    assert not prompt.features
    model(tokens[:, first.start : second.start], cache, images=prompt)
    assert list(prompt.features) == [first.patches.content]
    twin = [layer.fork(first.end) for layer in cache]
    again = place(model, "three")
    model(tokens[:, first.end :], twin, images=again)  # as behind a stored prefix
    assert first.patches.content not in again.features and len(again.features) == 2
    again.features.clear()
    encode_images(model.vision, again, first.start, 1)
    assert list(again.features) == [first.patches.content]
    behind = ImagePrompt(
        prompt.tokens, tuple(replace(s, start=s.start + 100) for s in prompt.spans)
    )
    encode_images(model.vision, behind, 0, behind.spans[-1].end)  # wherever the prompt begins
    assert len(behind.features) == 3


def test_a_step_that_was_not_told_of_images_is_refused(load: Load, tmp_path: Path) -> None:
    model = load("glm4v")
    prompt = place(model, "one")
    tokens = mx.array([prompt.tokens])
    cache = model.make_cache()
    model(tokens, cache, images=prompt)
    with pytest.raises(InvalidRequestError, match="holds images"):
        model(mx.array([[5]]), cache)
    with pytest.raises(InvalidRequestError, match="holds images"):
        run_sequences(model, mx.array([5]), [cache], [1], [1])
    metadata = describe_prompt(model, [prompt.tokens])
    with pytest.raises(InvalidRequestError, match="hold images"):
        save_prompt_cache(tmp_path / "cache.safetensors", cache, metadata)
    text = [layer.fork(prompt.spans[0].start) for layer in cache]
    model(mx.array([[5]]), text)  # what is left is text alone
    assert not text[0].holds_images


def test_images_for_many_rows_are_refused(load: Load) -> None:
    model = load("glm4v")
    prompt = place(model, "one")
    with pytest.raises(InvalidRequestError, match="batch of 2"):
        model(mx.array([prompt.tokens] * 2), images=prompt)
    with pytest.raises(InvalidRequestError, match="2 sequences for 1"):
        model.run_sequences(mx.array([5]), [model.make_cache()], [1], [1], [prompt, None])


def test_padding_behind_images_changes_nothing(load: Load) -> None:
    model = load("glm4v")
    prompt = place(model, "one")
    length = len(prompt.tokens)
    padded = mx.array([[*prompt.tokens, 0, 0, 0]])
    with ops.reference():
        wanted = model(padded[:, :length], images=prompt)
        found = model(padded, lengths=[length], images=prompt)[:, :length]
    assert relative_difference(found, wanted) < ALIKE
    found = model(padded, lengths=[length], images=prompt)[:, :length]
    wanted = model(padded[:, :length], images=prompt)
    assert relative_difference(found, wanted) < ALIKE
    assert model.row_exactness is not None or mx.array_equal(found, wanted).item()


def test_a_batch_is_of_text_alone(load: Load, folders: dict[str, Path]) -> None:
    model, tokenizer = load("glm4v"), load_tokenizer(folders["glm4v"])
    with pytest.raises(InvalidRequestError, match="place for an image"):
        batch_generate(model, tokenizer, ["hello", "look: <|image|>"])
    assert len(batch_generate(model, tokenizer, ["hello", "there"], 3).texts) == 2


def test_text_alone_reads_as_text(load: Load) -> None:
    model = load("glm4v")
    tokens = mx.array([[5, 6, 7, 8]])
    told = ImagePrompt([5, 6, 7, 8], ())
    assert mx.array_equal(model(tokens, images=told), model(tokens)).item()
