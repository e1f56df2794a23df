"""What an engine tells about itself: a snapshot for whoever asks, and records for whoever listens. Imports no MLX."""

from dataclasses import dataclass
from typing import Protocol

from mlx_edge.engine.request import Completion, Request


@dataclass(frozen=True)
class StepRecord:
    """One step of the engine."""

    seconds: float
    prompt_rows: int  # tokens of prompts read
    decode_rows: int  # sequences that went on by a token
    draft_rows: int  # drafts verified
    new_tokens: int  # tokens chosen
    running: int
    waiting: int
    images: int = 0  # encoded since the step before
    image_s: float = 0.0  # that it took, beside `seconds`


class Listener(Protocol):
    """Is told what happens, in the engine's thread: it must be quick, and what it raises is logged and dropped."""

    def step(self, record: StepRecord) -> None:
        """A step has ended."""

    def finished(self, request: Request, result: Completion | Exception) -> None:
        """A request has ended. A Completion tells all; so does an error that the caller was given."""


@dataclass(frozen=True)
class EngineStats:
    """A snapshot; counts since the start, sizes in bytes, as of the newest step."""

    running: int
    waiting: int
    steps: int
    prompt_tokens: int  # of the requests that have begun, cached ones included
    completion_tokens: int
    finished: int  # with an answer, also a cut one
    failed: int  # with an error
    batch_utilisation: float  # mean share of max_batch_size that generated, over the last steps
    step_ms_p50: float
    step_ms_p99: float
    kv_bytes: int  # of the running sequences' caches
    prefix_bytes: int
    budget_bytes: int
    reserved_bytes: int
    prefix_hits: int
    prefix_misses: int
    prefix_hit_tokens: int
    drafted: int
    accepted: int
    images: int  # that went through the tower; cached ones do not
    image_s: float  # that it took; no step ran meanwhile
    image_bytes: int  # of features that are kept
    row_exactness: (
        str | None
    )  # None: a request's tokens do not depend on its neighbours; else why they may
