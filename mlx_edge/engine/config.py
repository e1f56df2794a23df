"""How an engine is set up: one frozen record, checked when it is built. Imports no MLX."""

import math
from dataclasses import dataclass

from mlx_edge.errors import InvalidRequestError

MAX_DRAFT_TOKENS = 15  # with the token before them 16 rows, which small-batch kernels still serve


@dataclass(frozen=True)
class EngineConfig:
    """Sizes and switches of an engine.

    Scheduling: at most `max_batch_size` requests run at once and `max_queue_size` wait. An idle engine that had
    company before waits up to `batch_timeout_ms` for some. A step reads at most `prefill_chunk` prompt tokens, and
    while others generate only so many of each prompt as add `added_latency_ms` to it. A waiting request gains one
    priority per `ageing_s`. `max_context` lowers the model's own limit of positions.

    Cache: as the flags of mlx-lm (`kv_bits`, `kv_group_size`, `quantized_kv_start`, `max_kv_size`).

    Speculation: `draft_model` (a name) or `prompt_lookup`, of `num_draft_tokens` at most.

    Images: one of more than `max_pixels` is scaled down to it, whatever a request asks; None: the model's own limit.
    `image_cache_bytes` is for features of images that are kept for later requests; None: a sixteenth of what the budget
    leaves beside the weights.

    Memory in bytes: `memory_budget_bytes` None takes what the machine has, `prefix_cache_bytes` None a quarter of what
    the budget leaves beside the weights and 0 switches the prefix cache off. `prefix_cache_dir` keeps prefixes on disk.

    Raises: InvalidRequestError for a value outside its range.
    """

    max_batch_size: int = 16
    batch_timeout_ms: float = 10.0
    max_queue_size: int = 256
    max_context: int | None = None
    prefill_chunk: int = 512
    added_latency_ms: float = 15.0
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 0
    max_kv_size: int | None = None
    prompt_lookup: bool = False
    num_draft_tokens: int | None = None
    draft_model: str | None = None
    memory_budget_bytes: int | None = None
    prefix_cache_bytes: int | None = None
    prefix_cache_dir: str | None = None
    prefix_disk_bytes: int = 1 << 30
    ageing_s: float = 5.0
    max_pixels: int | None = None
    image_cache_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, low in (
            ("max_batch_size", 1),
            ("max_queue_size", 1),
            ("prefill_chunk", 1),
            ("max_context", 1),
            ("quantized_kv_start", 0),
            ("max_kv_size", 5),
            ("memory_budget_bytes", 1),
            ("prefix_cache_bytes", 0),
            ("prefix_disk_bytes", 0),
            ("max_pixels", 1),
            ("image_cache_bytes", 0),
        ):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < low):
                raise InvalidRequestError(f"{name} is {value!r}, expected an integer from {low}")
        for name in ("batch_timeout_ms", "added_latency_ms", "ageing_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InvalidRequestError(f"{name} is {value!r}, expected a finite number from 0")
        if self.ageing_s == 0:
            raise InvalidRequestError("ageing_s is 0, expected seconds above it")
        self._check_cache()
        self._check_speculation()

    def _check_cache(self) -> None:
        if self.kv_bits not in (None, 4, 8):
            raise InvalidRequestError(f"kv_bits is {self.kv_bits!r}, expected 4 or 8")
        if self.kv_group_size not in (32, 64, 128):
            raise InvalidRequestError(
                f"kv_group_size is {self.kv_group_size!r}, expected 32, 64 or 128"
            )

    def _check_speculation(self) -> None:
        if self.draft_model is not None and self.prompt_lookup:
            raise InvalidRequestError(
                "a draft model and prompt lookup were both asked for; choose one of them"
            )
        drafts = self.num_draft_tokens
        if drafts is not None and not 1 <= drafts <= MAX_DRAFT_TOKENS:
            raise InvalidRequestError(
                f"num_draft_tokens is {drafts}, expected 1 to {MAX_DRAFT_TOKENS}"
            )
