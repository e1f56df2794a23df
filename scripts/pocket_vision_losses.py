"""What `pocket-vision` is taught beside the answers; none of it is shipped.

A model this small finds out what to look at only after very long training, if nobody tells it. So an
image token must say, read with the decoder's own embeddings, which word, shape and colour it covers; a
linear reading of it must tell state and place of the thing; and one head of the decoder must look, from
every token of an answer, at the thing that the instruction names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from pocket_vision_batches import STATES, UNIT_WEIGHT, Batch, Rows
from pocket_vision_model import PocketVisionModel, Seen
from torch import Tensor, nn

NOTHING_WEIGHT = 0.3


class Probes(nn.Module):
    """Linear readings of an image token: state, and four digits of the place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.state = nn.Linear(width, len(STATES))
        self.digits = nn.Linear(width, 40)


@dataclass(frozen=True)
class NameIds:
    """The tokens of all words, shapes and colours, in the order of their lists."""

    words: Tensor
    shapes: Tensor
    colours: Tensor


def naming_loss(cells: Tensor, embeddings: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy of what cells (B, C, E) cover; the score of "nothing" is 0."""
    scores = F.pad(cells @ embeddings.T, (1, 0))
    each = F.cross_entropy(scores.flatten(0, 1), truth.flatten(), reduction="none")
    named = (truth.flatten() > 0).float()
    rest = 1 - named
    return (each * named).sum() / named.sum().clamp(min=1) + NOTHING_WEIGHT * (
        each * rest
    ).sum() / rest.sum().clamp(min=1)


def pointing_loss(pointing: Tensor, focus: Tensor, mask: Tensor, image_start: int) -> Tensor:
    """Mean of -log of the attention that falls on the cells of `focus` (B, L, C).

    `pointing` are queries and keys (2, B, L, D), `mask` (L, L) is added to their scores.
    """
    row, place = focus.any(-1).nonzero(as_tuple=True)
    queries, keys = pointing
    begin = int(place.min())
    scores = (queries[:, begin:] @ keys.mT / math.sqrt(keys.shape[-1]) + mask[begin:])[
        row, place - begin
    ]
    wanted = focus[row, place]
    on_image = scores[:, image_start : image_start + wanted.shape[1]]
    hit = on_image.masked_fill(~wanted, float("-inf")).logsumexp(-1)
    return (scores.logsumexp(-1) - hit).mean()


def answer_loss(model: PocketVisionModel, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the weighted cross-entropy of the next tokens, and the share that is right.

    The share leaves out the last digits, which no target is small enough to need.
    """
    chosen = (batch.weights > 0).nonzero(as_tuple=True)
    weights, targets = batch.weights[chosen], batch.tokens.roll(-1, dims=1)[chosen]
    logits = model.lm_head(hidden[chosen])
    each = F.cross_entropy(logits, targets, reduction="none")
    right = (logits.argmax(-1) == targets)[weights > UNIT_WEIGHT].float().mean()
    return (each * weights).sum() / weights.sum(), right


def all_losses(
    model: PocketVisionModel, probes: Probes, seen: Seen, batch: Batch, ids: NameIds, rows: Rows
) -> dict[str, Tensor]:
    """Return every loss by name, and the share of right tokens as `right`."""
    embedding = model.model.language_model.embed_tokens.weight
    states, digits = probes.state(seen.cells), probes.digits(seen.cells).unflatten(-1, (4, 10))
    answer, right = answer_loss(model, seen.hidden, batch)
    return {
        "right": right,
        "answer": answer,
        "point": pointing_loss(seen.pointing, batch.focus, rows.mask, rows.image_start),
        "word": naming_loss(seen.cells, embedding[ids.words], batch.words),
        "shape": naming_loss(seen.cells, embedding[ids.shapes], batch.shapes),
        "colour": naming_loss(seen.cells, embedding[ids.colours], batch.colours),
        "state": F.cross_entropy(states.flatten(0, 1), batch.states.flatten(), ignore_index=-1),
        "place": F.cross_entropy(digits.flatten(0, 2), batch.digits.flatten(), ignore_index=-1),
    }


WEIGHTS = {
    "answer": 1.0,
    "point": 0.5,
    "word": 0.5,
    "shape": 0.3,
    "colour": 0.3,
    "state": 0.3,
    "place": 0.5,
}
# What lagged behind in the shipped run came to count for more: reading, then places.
CHANGES = ((450, {"word": 1.5, "shape": 0.6}), (850, {"place": 1.5}), (1950, {"place": 4.0}))


def weights_at(step: int) -> dict[str, float]:
    """Return how much each loss counts at a step."""
    weights = dict(WEIGHTS)
    for begin, changed in CHANGES:
        if step >= begin:
            weights |= changed
    return weights
