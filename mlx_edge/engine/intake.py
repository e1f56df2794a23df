"""From a request to what can run: its prompt in tokens, its grammar ready, and checked against the model.

Long texts, grammars and images take their time; those are prepared beside the engine's thread. Touches no arrays.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_edge.decoding.loop import check_prompt
from mlx_edge.decoding.stream import encode_text
from mlx_edge.engine.images.intake import PatchHold, PatchRoom, place_request_images
from mlx_edge.engine.request import Request
from mlx_edge.engine.served import Needs, Served
from mlx_edge.errors import InvalidRequestError

if TYPE_CHECKING:  # slow to import
    from mlx_edge.decoding.constraints import Constraint
    from mlx_edge.models.vision.prompt import ImagePrompt

QUICK_CHARACTERS = 4096  # a text of so many is encoded in about a millisecond


@dataclass(frozen=True)
class Prepared:
    """A request that can be served."""

    tokens: tuple[int, ...]
    limit: int  # tokens that may follow
    constraint: "Constraint | None"
    needs: Needs
    images: "ImagePrompt | None" = None
    hold: PatchHold | None = None  # the room of its patches

    def release(self) -> None:
        """Its patches are not needed any more, or it never runs."""
        if self.hold is not None:
            self.hold.release()


def is_quick(request: Request) -> bool:
    """Whether preparing it is no work to speak of."""
    is_short = not isinstance(request.prompt, str) or len(request.prompt) <= QUICK_CHARACTERS
    return is_short and request.grammar is None and not request.images


def prepare(request: Request, served: Served, room: PatchRoom | None = None) -> Prepared:
    """Encode and check. A request with images waits until there is room for their patches.

    Raises: InvalidRequestError for what this model cannot serve, MemoryBudgetError for what would never fit.
    """
    if request.images and room is not None:
        room.wait()
    tokens = _encode(request, served)
    images = place_request_images(
        request, tokens, served.model, served.context_size, served.config.max_pixels, room
    )
    if images is not None:
        tokens = tuple(images.tokens)
    extremes = min(tokens), max(tokens)
    limits = served.model.config
    limit = check_prompt(extremes, len(tokens), limits, request.max_tokens, served.context_size)
    for token in (*request.sampling.logit_bias, *request.stop_tokens):
        if token >= limits.vocab_size:
            raise InvalidRequestError(
                f"logit_bias or stop_tokens names token {token}; the vocabulary has {limits.vocab_size}"
            )
    needs = served.needed_bytes(len(tokens), limit, images)
    constraint = _make_constraint(request, served)
    hold = None
    if images is not None and room is not None:
        hold = room.hold(sum(span.patches.values.nbytes for span in images.spans))
    return Prepared(tokens, limit, constraint, needs, images, hold)


def _encode(request: Request, served: Served) -> tuple[int, ...]:
    if not isinstance(request.prompt, str):
        return request.prompt
    tokens = tuple(encode_text(served.tokenizer, request.prompt))
    if not tokens:
        raise InvalidRequestError("the prompt has no tokens; expected one or more")
    return tokens


def _make_constraint(request: Request, served: Served) -> "Constraint | None":
    grammar = request.grammar
    if grammar is None:
        return None
    from mlx_edge.decoding.constraints import make_constraint

    match grammar.kind:
        case "json_schema":
            return make_constraint(served.tokenizer, json_schema=grammar.source)
        case "regex":
            return make_constraint(served.tokenizer, regex=grammar.source)
        case "lark":
            return make_constraint(served.tokenizer, lark=grammar.source)
