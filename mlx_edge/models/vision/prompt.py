"""A prompt with images: where they stand among the tokens, to what RoPE turns, and what a step is told of them.

Each image is a run of one token, one for every `merge_unit` patches; an `ImagePrompt` says what stands there. RoPE
turns the tokens of an image by their frame, row and column from where the image begins, and what follows from where
its longest side ends (Wang et al. 2024, M-RoPE): behind images a token's turn is its position plus a shift.
Knows nothing of pixels and of weights.
"""

import hashlib
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.vision.config import VisionConfig
from mlx_edge.models.vision.processor import Patches
from mlx_edge.models.vision.tower import Grid, VisionTower
from mlx_edge.ops import StepMeta


@dataclass(frozen=True)
class ImageSpan:
    """One image's run of tokens."""

    start: int  # position of its first token in the sequence
    grid: Grid  # frames, rows and columns of tokens
    turn: int  # where RoPE turns its first token
    patches: Patches

    @property
    def num_tokens(self) -> int:
        """Tokens of the run."""
        frames, rows, columns = self.grid
        return frames * rows * columns

    @property
    def end(self) -> int:
        """Position behind its last token."""
        return self.start + self.num_tokens

    @property
    def shift(self) -> int:
        """What is added to the positions behind it."""
        return self.turn + max(self.grid[1:]) - self.end

    def turns(self) -> NDArray[np.int64]:
        """(3, num_tokens): frame, row and column, from the image's turn on."""
        return np.indices(self.grid).reshape(3, -1) + self.turn


@dataclass
class ImagePrompt:
    """What stands where in one sequence. Features are computed once, in the model's thread."""

    tokens: list[int]  # the prompt's, with a run for each image
    spans: tuple[ImageSpan, ...]  # in their order
    # By an image's content: whoever serves many sequences may hand in one mapping for all.
    features: MutableMapping[bytes, mx.array] = field(default_factory=dict, repr=False)

    @property
    def shift(self) -> int:
        """RoPE's turn minus the position, for all that comes behind the last image."""
        return self.spans[-1].shift if self.spans else 0

    def shift_at(self, position: int) -> int:
        """RoPE's turn minus the position of a token of text."""
        behind = [span.shift for span in self.spans if span.end <= position]
        return behind[-1] if behind else 0

    def spans_in(self, begin: int, length: int) -> Iterator[ImageSpan]:
        """The images of which tokens stand among the `length` positions from `begin`."""
        return (s for s in self.spans if s.start < begin + length and begin < s.end)

    def in_step(self, begin: int, length: int) -> bool:
        """Whether a token of an image stands there."""
        return any(True for _ in self.spans_in(begin, length))

    def turns(self, begin: int, length: int) -> NDArray[np.int32]:
        """(3, length): to what RoPE turns these positions of the prompt and of what follows it, on each axis."""
        turns = np.tile(np.arange(begin, begin + length), (3, 1)) + self.shift_at(begin)
        for span in self.spans_in(begin, length):
            first, last = max(span.start, begin), min(span.end, begin + length)
            own = span.turns()[:, first - span.start : last - span.start]
            turns[:, first - begin : last - begin] = own
            behind = np.arange(span.end, begin + length) + span.shift
            turns[:, span.end - begin :] = behind
        return turns.astype(np.int32)

    def keys(self, tokens: Sequence[int]) -> list[int]:
        """The sequence's tokens, with those of images replaced by negative numbers that tell its content.

        What a prefix cache compares: two images are alike where all their numbers are. `tokens` are the prompt and
        what follows it, from position 0.
        """
        keys = list(tokens)
        for span in self.spans:
            drawn = hashlib.shake_256(span.patches.content).digest(8 * span.num_tokens)
            numbers = np.frombuffer(drawn, np.int64) >> 1  # 63 bits
            keys[span.start : span.end] = (-1 - np.abs(numbers)).tolist()
        return keys[: len(tokens)]

    def missing(self, begin: int, length: int) -> list[ImageSpan]:
        """The images there whose features are still to be computed, each content once."""
        spans = {s.patches.content: s for s in self.spans_in(begin, length)}
        return [span for content, span in spans.items() if content not in self.features]


def place_images(
    tokens: Sequence[int], patches: Sequence[Patches], config: VisionConfig, *, begin: int = 0
) -> ImagePrompt:
    """The prompt whose every image token is the place of one image, each widened to the image's run.

    `begin` is the position of the first token, behind a stored prompt of text alone.

    Raises: InvalidRequestError where there are more or fewer places than images.
    """
    num_places = sum(token == config.image_token_id for token in tokens)
    if num_places != len(patches):
        raise InvalidRequestError(
            f"{_count(len(patches), 'image')} given, and the prompt has {_count(num_places, 'place')} for one "
            f"(token {config.image_token_id}); expected one for each, written by the chat template"
        )
    placed: list[int] = []
    spans: list[ImageSpan] = []
    images = iter(patches)
    shift = 0
    for token in tokens:
        if token != config.image_token_id:
            placed.append(token)
            continue
        image = next(images)
        frames, rows, columns = image.grid
        start = begin + len(placed)
        merged = (frames, rows // config.merge_size, columns // config.merge_size)
        span = ImageSpan(start, merged, start + shift, image)
        spans.append(span)
        shift = span.shift
        placed += [token] * span.num_tokens
    return ImagePrompt(placed, tuple(spans))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def encode_images(
    tower: VisionTower, images: ImagePrompt, begin: int, length: int
) -> dict[bytes, mx.array]:
    """The features that these positions need, by content; those that are not there yet are computed and waited for."""
    found: dict[bytes, mx.array] = {}
    for span in images.spans_in(begin, length):
        content = span.patches.content
        features = found.get(content, images.features.get(content))
        if features is None:
            [features] = tower([span.patches])
            mx.eval(features)  # the next step may be another thread's
            images.features[content] = features
        found[content] = features
    return found


def turn_step(meta: StepMeta, images: Sequence[ImagePrompt | None]) -> StepMeta:
    """The step with what RoPE has to know: sequence i is described by `images[i]`, or has none."""
    parts = list(zip(images, meta.starts, meta.lengths, strict=True))
    if any(own is not None and own.in_step(begin, length) for own, begin, length in parts):
        plain = ImagePrompt([], ())
        # Without `is_ragged` every row is as wide as the step: padding has turns too, and nobody reads them.
        widths = meta.lengths if meta.is_ragged else (meta.width,) * len(parts)
        turns = [
            (own or plain).turns(begin, width)
            for (own, begin, _), width in zip(parts, widths, strict=True)
        ]
        return replace(meta, axes=mx.array(np.concatenate(turns, axis=1)[:, None]))
    shifts = tuple(0 if own is None else own.shift_at(begin) for own, begin, _ in parts)
    return replace(meta, shifts=shifts) if any(shifts) else meta


def show_images(
    x: mx.array, tower: VisionTower, meta: StepMeta, images: Sequence[ImagePrompt | None]
) -> mx.array:
    """x (1, L, E) of a step's tokens with the features of images in the rows where they stand."""
    parts: list[mx.array] = []
    done = offset = 0  # rows of x that are in `parts`; where the sequence begins
    for own, begin, length in zip(images, meta.starts, meta.lengths, strict=True):
        if own is not None:
            found = encode_images(tower, own, begin, length)
            for span in own.spans_in(begin, length):
                first, last = max(span.start, begin), min(span.end, begin + length)
                features = found[span.patches.content]
                at = offset + first - begin
                parts += [x[:, done:at], features[None, first - span.start : last - span.start]]
                done = at + last - first
        offset += length
    if not parts:
        return x
    return mx.concatenate([part.astype(x.dtype) for part in [*parts, x[:, done:]]], axis=1)
