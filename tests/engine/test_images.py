"""Requests with images: the tokens of the single loop beside others, prefixes by content, one tower run per image."""

import io
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_edge.decoding.stream import stream_generate
from mlx_edge.engine import service as service_module
from mlx_edge.engine.blocking import BlockingEngine
from mlx_edge.engine.config import EngineConfig
from mlx_edge.engine.images.features import ImageFeatures
from mlx_edge.engine.images.intake import PatchRoom, place_request_images
from mlx_edge.engine.ledger import FEATURES, PREFIXES
from mlx_edge.engine.memory.model import MemoryModel
from mlx_edge.engine.memory.vision_sizes import VisionSizes
from mlx_edge.engine.request import MAX_IMAGES, Completion, Request
from mlx_edge.engine.step import run_step
from mlx_edge.errors import InvalidRequestError, MemoryBudgetError
from mlx_edge.models.decoder import Decoder
from mlx_edge.models.load import load_model
from mlx_edge.models.vision import reading
from mlx_edge.models.vision.image import read_image
from mlx_edge.models.vision.processor import Patches
from mlx_edge.models.vision.prompt import ImagePrompt, ImageSpan
from mlx_edge.models.vision.tower import VisionTower
from mlx_edge.text import Tokenizer, load_tokenizer
from mlx_edge.weights.hub import find_model
from tests.models.vision.folders import write_model

Seeing = tuple[Decoder, Tokenizer]


def draw(seed: int, size: tuple[int, int] = (40, 56)) -> bytes:
    """A PNG of noise, (height, width)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module", params=["glm4v", "qwen2_5_vl"])
def seeing(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Seeing:
    """A tiny random model that sees; its tokens are read as those of the bundled model."""
    folder = write_model(request.param, tmp_path_factory.mktemp(request.param))
    return load_model(folder), load_tokenizer(find_model("pocket"))


@pytest.fixture
def engine(seeing: Seeing) -> Iterator[BlockingEngine]:
    config = EngineConfig(max_batch_size=4, prefill_chunk=16, kv_group_size=32, max_context=400)
    with BlockingEngine(seeing, config) as made:
        yield made


@pytest.fixture
def towers(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The contents that went through a tower."""
    seen: list[bytes] = []
    run = VisionTower.__call__

    def count(self: VisionTower, patches: Any) -> list[mx.array]:
        seen.extend(one.content for one in patches)
        return run(self, patches)

    monkeypatch.setattr(VisionTower, "__call__", count)
    return seen


def ask(model: Decoder, *parts: int | bytes, **options: Any) -> Request:
    """A request whose prompt has runs of so many tokens, and images between."""
    assert model.vision is not None
    token = model.vision.config.image_token_id
    ids = [t for t in range(model.config.vocab_size) if t != token]
    tokens: list[int] = []
    for part in parts:
        tokens += (
            [token]
            if isinstance(part, bytes)
            else [ids[(3 + 7 * i) % len(ids)] for i in range(part)]
        )
    images = tuple(part for part in parts if isinstance(part, bytes))
    options = {"max_tokens": 6, "ignore_eos": True, **options}
    return Request(tuple(tokens), images=images, **options)


def answer_alone(seeing: Seeing, request: Request, **cache: Any) -> list[int]:
    """What the single loop gives."""
    model, tokenizer = seeing
    responses = stream_generate(
        model,
        tokenizer,
        request.prompt,
        request.max_tokens,
        images=request.images,
        max_pixels=request.max_pixels,
        prompt_cache=model.make_cache(**cache),
    )
    return [response.token for response in responses]


def mix(model: Decoder) -> list[Request]:
    first, second, tall = draw(1), draw(2), draw(3, (120, 30))
    return [
        ask(model, 5, first, 9),
        ask(model, 40),
        ask(model, second, 3, tall, 4),
        ask(model, 2, first, 1, first, 1, max_tokens=9),
        ask(model, 7, max_tokens=12),
        ask(model, 30, tall, 20, max_pixels=2000),
    ]


@pytest.mark.parametrize("options", [{}, {"prompt_lookup": True}, {"max_kv_size": 60}])
def test_a_mix_has_the_tokens_of_the_single_loop(seeing: Seeing, options: dict[str, Any]) -> None:
    model, _ = seeing
    requests = mix(model)
    cache = {"max_kv_size": options["max_kv_size"]} if "max_kv_size" in options else {}
    wanted = [answer_alone(seeing, one, **cache) for one in requests]
    config = EngineConfig(max_batch_size=4, prefill_chunk=16, max_context=400, **options)
    with BlockingEngine(seeing, config) as engine:
        for order in (range(6), reversed(range(6)), (0, 0, 3, 3, 1)):
            futures = [(i, engine.enqueue(requests[i])) for i in order]
            for i, future in futures:
                assert list(future.result(60).tokens) == wanted[i], i


def test_the_same_image_again_is_a_hit_and_another_one_says_where_it_begins(
    engine: BlockingEngine, seeing: Seeing, towers: list[bytes]
) -> None:
    model, _ = seeing
    first, other = draw(1), draw(2)
    fresh = engine.generate(ask(model, 40, first, 20))
    again = engine.generate(ask(model, 40, first, 20))
    assert again.tokens == fresh.tokens
    assert again.usage.cached_tokens == again.usage.prompt_tokens - 1
    assert again.usage.cache_miss is None
    assert len(towers) == 1
    differs = engine.generate(ask(model, 40, other, 20))
    assert differs.usage.cached_tokens == 40
    assert (
        differs.usage.cache_miss
        == "the nearest entry differs after 40 tokens, where image 1 begins"
    )
    assert len(towers) == 2
    assert differs.usage.image_tokens == differs.usage.prompt_tokens - 60


def test_an_image_behind_another_text_is_not_encoded_again(
    engine: BlockingEngine, seeing: Seeing, towers: list[bytes]
) -> None:
    model, _ = seeing
    shown = draw(1)
    engine.generate(ask(model, 3, shown, 3))
    engine.generate(ask(model, shown, 9, shown))
    assert len(towers) == 1
    stats = engine.stats()
    assert (stats.images, stats.image_bytes > 0, stats.image_s > 0) == (1, True, True)


def test_a_prefix_never_ends_inside_an_image(engine: BlockingEngine, seeing: Seeing) -> None:
    model, _ = seeing
    shown = draw(1, (200, 200))
    wanted = answer_alone(seeing, ask(model, 40, shown, 2))
    begun = threading.Event()
    engine.engine.watch(_Steps(lambda record: begun.set()))
    future = engine.enqueue(ask(model, 40, shown, 80, max_tokens=30))
    assert begun.wait(30)
    future.cancel()
    found = engine.generate(ask(model, 40, shown, 2))
    assert list(found.tokens) == wanted
    image_end = found.usage.prompt_tokens - 2
    assert not 40 < found.usage.cached_tokens < image_end


class _Steps:
    def __init__(self, listen: Callable[[Any], None]) -> None:
        self.step = listen

    def finished(self, request: Request, result: Completion | Exception) -> None:
        """Nothing to do."""


def test_listeners_hear_of_the_tower_beside_the_steps(
    engine: BlockingEngine, seeing: Seeing
) -> None:
    records: list[Any] = []
    engine.engine.watch(_Steps(records.append))
    engine.generate(ask(seeing[0], 3, draw(1), 2, draw(2), 4))
    assert sum(record.images for record in records) == 2
    assert sum(record.image_s for record in records) == pytest.approx(engine.stats().image_s)


def test_steps_of_others_run_between_two_images(seeing: Seeing, towers: list[bytes]) -> None:
    model, _ = seeing
    at_step: list[int] = []
    with BlockingEngine(seeing, EngineConfig(max_context=400, prefill_chunk=16)) as engine:
        stream = engine.stream(ask(model, 5, max_tokens=300))
        next(stream)
        engine.engine.watch(_Steps(lambda record: at_step.append(record.images)))
        engine.generate(ask(model, 3, draw(1), draw(2), draw(3), 3))
        stream.close()
    assert sum(at_step) == len(towers) == 3
    assert max(at_step) == 1


def test_a_tower_that_fails_fails_its_request_alone(
    engine: BlockingEngine, seeing: Seeing, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = seeing
    run = VisionTower.__call__
    wanted = answer_alone(seeing, ask(model, 4, draw(1), 4))

    def fail(self: VisionTower, patches: Any) -> list[mx.array]:
        if len(patches[0].values) == 64:
            raise RuntimeError("[malloc] Unable to allocate 1 bytes.")
        return run(self, patches)

    monkeypatch.setattr(VisionTower, "__call__", fail)
    broken = engine.enqueue(ask(model, 4, draw(7, (32, 32)), 4))
    sound = engine.enqueue(ask(model, 4, draw(1), 4))
    with pytest.raises(RuntimeError, match="Unable to allocate"):
        broken.result(30)
    assert list(sound.result(30).tokens) == wanted


def test_after_a_failed_step_the_images_are_read_again(
    engine: BlockingEngine, seeing: Seeing, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = seeing
    requests = [ask(model, 40, draw(1), n, max_tokens=20) for n in (3, 9)] + [
        ask(model, 20, max_tokens=20)
    ]
    wanted = [answer_alone(seeing, one) for one in requests]
    assert [list(engine.generate(one).tokens) for one in requests] == wanted  # all is cached now
    failures = [2]

    def fail(model: Any, turns: Any) -> None:
        if (
            len(turns) > 1
            and failures[0]
            and any(turn.sequence.num_generated > 3 for turn in turns)
        ):
            failures[0] -= 1
            raise RuntimeError("[malloc] Unable to allocate 1 bytes.")
        run_step(model, turns)

    monkeypatch.setattr(service_module, "run_step", fail)
    futures = [engine.enqueue(one) for one in requests]
    assert [list(future.result(60).tokens) for future in futures] == wanted
    assert failures[0] < 2


def test_what_is_promised_is_given_back(engine: BlockingEngine, seeing: Seeing) -> None:
    model, _ = seeing
    served = engine.engine._served
    budget = served.ledger.budget
    assert budget is not None
    futures = [engine.enqueue(one) for one in mix(model)]
    futures += [engine.enqueue(ask(model, 5, draw(9), 90, max_tokens=300))]
    futures[-1].cancel()
    for future in futures[:-1]:
        future.result(60)
    engine.generate(ask(model, 3))
    stored = budget.of(PREFIXES) + budget.of(FEATURES)
    assert budget.reserved - stored == sum(budget.standing.values())
    assert budget.of(FEATURES) == engine.stats().image_bytes
    assert engine.engine._worker._room.held == 0


def test_the_disk_tier_tells_images_apart(
    seeing: Seeing, tmp_path: Path, towers: list[bytes]
) -> None:
    model, _ = seeing
    config = EngineConfig(max_context=400, prefix_cache_dir=str(tmp_path))
    with BlockingEngine(seeing, config) as engine:
        fresh = engine.generate(ask(model, 120, draw(1), 20))
    with BlockingEngine(seeing, config) as engine:
        again = engine.generate(ask(model, 120, draw(1), 20))
        other = engine.generate(ask(model, 120, draw(2), 20))
    assert again.tokens == fresh.tokens
    assert again.usage.cached_tokens == again.usage.prompt_tokens - 1
    assert other.usage.cached_tokens == 120
    assert len(towers) == 2


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ((), "0 images given, and the prompt has 1 place"),
        ((draw(1), draw(2)), "2 images given, and the prompt has 1 place"),
        ((draw(1)[:200],), "image 1"),
        ((b"no image",), "image 1"),
    ],
)
def test_what_cannot_be_read_is_said(
    engine: BlockingEngine, seeing: Seeing, images: tuple[bytes, ...], said: str
) -> None:
    request = Request.of(ask(seeing[0], 3, draw(1), 3), images=images, max_tokens=1)
    with pytest.raises(InvalidRequestError, match=said):
        engine.generate(request)


def test_images_that_the_context_cannot_hold(engine: BlockingEngine, seeing: Seeing) -> None:
    with pytest.raises(
        InvalidRequestError, match=r"tokens with image \d of 9, the model's context"
    ):
        engine.generate(ask(seeing[0], *[draw(i, (88, 88)) for i in range(9)], 1))


def test_a_model_of_text_is_shown_no_images() -> None:
    with BlockingEngine("pocket") as engine:
        with pytest.raises(InvalidRequestError, match="reads text only"):
            engine.generate("What is this?", images=(draw(1),))
        assert engine.stats().image_bytes == 0


@pytest.mark.parametrize(
    "options",
    [
        {"images": b"one"},
        {"images": ("text",)},
        {"images": (b"",)},
        {"images": (b"x",) * (MAX_IMAGES + 1)},
        {"images": (bytes(65 << 20),)},
        {"max_pixels": 0},
        {"max_pixels": 1.5},
    ],
)
def test_a_request_is_checked_when_it_is_built(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        Request("a", **options)
    with pytest.raises(InvalidRequestError):
        Request.of("a", **options)


def test_the_engine_lowers_the_pixels_of_all(seeing: Seeing) -> None:
    model, _ = seeing
    wide = draw(1, (80, 80))
    config = EngineConfig(max_context=400, max_pixels=1024)
    with BlockingEngine(seeing, config) as engine:
        capped = engine.generate(ask(model, wide, 3, max_pixels=6400))
        small = engine.generate(ask(model, wide, 3, max_pixels=256))
    assert small.usage.image_tokens < capped.usage.image_tokens <= 1024 // 64


def test_what_an_image_needs_beyond_the_budget_is_refused(seeing: Seeing) -> None:
    model, _ = seeing
    with BlockingEngine(seeing, EngineConfig(max_context=400)) as engine:
        budget = engine.engine._served.ledger.budget
        assert budget is not None
        needs = engine.engine._served.needed_bytes(100, 10)
        assert needs.begin == needs.encoded == needs.read > 0
        budget.total = sum(budget.standing.values()) + needs.begin + 200_000
        assert engine.generate(ask(model, 100, max_tokens=10)).tokens
        with pytest.raises(MemoryBudgetError, match=r"images .* lower max_pixels"):
            engine.generate(ask(model, 50, draw(1, (300, 300)), max_tokens=10))


def test_a_draft_model_drafts_for_texts_alone(
    engine: BlockingEngine, seeing: Seeing, caplog: pytest.LogCaptureFixture
) -> None:
    served = replace(engine.engine._served, draft_model=seeing[0])
    assert served.make_proposer(ask(seeing[0], 4)) is not None
    with caplog.at_level("INFO"):
        assert served.make_proposer(ask(seeing[0], 4, draw(1))) is None
    assert "does not see" in caplog.text
    lookup = ask(seeing[0], 4, draw(1), prompt_lookup=True)
    assert served.make_proposer(lookup) is not None


def span_of(values: Any, content: bytes, tokens: int) -> ImagePrompt:
    patches = Patches(values, (1, 2, 2 * tokens), 2, content)
    return ImagePrompt([1] * tokens, (ImageSpan(0, (1, 1, tokens), 0, patches),))


def test_features_are_kept_within_their_limit() -> None:
    def tower(patches: Any) -> list[mx.array]:
        return [mx.zeros((4, 8)) for _ in patches]

    kept = ImageFeatures(tower, 300)  # type: ignore[arg-type]
    for name in (b"a", b"b"):
        kept.encode_next(span_of(np.zeros((16, 3), np.float32), name, 4), 0)
    assert kept.nbytes == 2 * 128
    assert kept.find(span_of(None, b"a", 4), 0)  # used last
    kept.encode_next(span_of(np.zeros((16, 3), np.float32), b"c", 4), 0)
    assert [kept.find(span_of(None, name, 4), 0) for name in (b"a", b"b", b"c")] == [
        True,
        False,
        True,
    ]
    assert kept.find(span_of(None, b"z", 4), 4)  # the image lies before
    assert (kept.evict(1), kept.nbytes) == (128, 128)


def test_who_finds_no_room_for_patches_waits() -> None:
    room = PatchRoom(100)
    hold = room.hold(150)
    passed = threading.Event()

    def enter() -> None:
        room.wait()
        passed.set()

    thread = threading.Thread(target=enter)
    thread.start()
    assert not passed.wait(0.05)
    hold.release()
    hold.release()
    assert passed.wait(10)
    assert room.held == 0
    room.hold(200)
    room.close()
    room.wait()  # nobody waits for a room that is closed
    thread.join()


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[bytes], threading.Event]]:
    """The files that were decoded, and what each of them waits for."""
    seen: list[bytes] = []
    may_go = threading.Event()

    def wait(data: bytes, name: str) -> Any:
        seen.append(data)
        assert may_go.wait(30)
        return read_image(data, name)

    monkeypatch.setattr(reading, "read_image", wait)
    yield seen, may_go
    may_go.set()


def test_a_file_whose_patches_are_there_is_not_decoded_again(
    seeing: Seeing, decoding: tuple[list[bytes], threading.Event]
) -> None:
    model, _ = seeing
    seen, may_go = decoding
    may_go.set()
    room, data = PatchRoom(1 << 20), draw(1)
    request = ask(model, 3, data, 3, data)

    def place(request: Request) -> ImagePrompt | None:
        return place_request_images(request, tuple(request.prompt), model, 400, None, room)  # type: ignore[arg-type]

    made = [place(request) for _ in range(2)]
    assert seen == [data]
    place(ask(model, 3, data, max_pixels=256))
    assert len(seen) == 2
    made.clear()
    assert not room.patches


def test_who_ends_while_images_are_decoded_is_told_at_once_and_not_decoded(
    engine: BlockingEngine, seeing: Seeing, decoding: tuple[list[bytes], threading.Event]
) -> None:
    model, _ = seeing
    seen, may_go = decoding
    first = engine.enqueue(ask(model, 3, draw(1)))
    late = engine.enqueue(ask(model, 3, draw(2), deadline_s=0.01))
    given_up = engine.enqueue(ask(model, 3, draw(3)))
    given_up.cancel()
    assert late.result(20).finish_reason == "deadline"  # nothing runs, and nothing else comes
    assert not first.done()
    may_go.set()
    assert first.result(60).tokens
    assert engine.generate(ask(model, 3, draw(4))).tokens
    assert seen == [draw(1), draw(4)]


def test_memory_knows_towers_and_images(seeing: Seeing) -> None:
    model, _ = seeing
    memory = MemoryModel.of(model, EngineConfig(max_batch_size=2))
    vision = memory.vision
    assert isinstance(vision, VisionSizes)
    held = sum(array.nbytes for array in _arrays(model.vision))
    assert vision.weights.private + vision.weights.mapped == pytest.approx(held, rel=0.05)
    assert memory.weights.private >= vision.weights.private
    assert vision.largest_image() * vision.config.patch_size**2 <= model.vision.processor.max_pixels  # type: ignore[union-attr]
    few, many = (memory.features_and_encoding([n]) for n in (64, 4096))
    assert few[0] < many[0] < many[1]
    assert memory.features_and_encoding([64, 64])[0] == 2 * few[0]


def _arrays(part: Any) -> Iterator[Any]:
    from mlx_edge.models.decoder import find_weights

    for weight in find_weights(part):
        yield weight if isinstance(weight, mx.array) else weight.restore().weight
