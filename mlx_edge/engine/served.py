"""What an engine runs on: model, tokenizer, draft model, memory and prefixes, put together in the engine's thread.

Everything lazy is evaluated here, or before by whoever made it: MLX computes a lazy array in its maker's thread alone.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_edge.decoding.proposers import (
    Proposer,
    check_same_vocabulary,
    check_trimmable,
    make_proposer,
)
from mlx_edge.engine.config import EngineConfig
from mlx_edge.engine.images.features import ImageFeatures
from mlx_edge.engine.ledger import Ledger
from mlx_edge.engine.logprobs import TokenTexts
from mlx_edge.engine.memory.budget import MemoryBudget, largest, refuse
from mlx_edge.engine.memory.machine import default_budget_bytes
from mlx_edge.engine.memory.model import MemoryModel, limit_mlx_cache
from mlx_edge.engine.prefix.cache import PrefixCache
from mlx_edge.engine.prefix.disk import PrefixDisk
from mlx_edge.engine.request import Request
from mlx_edge.errors import InvalidRequestError, MemoryBudgetError
from mlx_edge.models.decoder import Decoder, find_arrays
from mlx_edge.models.interface import LanguageModel, find_tower, make_cache_of, row_is_exact
from mlx_edge.models.load import load
from mlx_edge.models.vision.prompt import ImagePrompt
from mlx_edge.models.vision.tower import VisionTower
from mlx_edge.text import Tokenizer

logger = logging.getLogger(__name__)

SMALLEST_CHUNK = 16  # prompt tokens in a step, however little memory there is
DRAFT_ROOM = 16  # positions beyond a sequence's end that rejected drafts may take for a moment


@dataclass(frozen=True)
class Needs:
    """Bytes that a request has to be promised, at three times of its life."""

    begin: int  # its images are patches
    encoded: int  # its images are features
    read: int  # its prompt is stored


@dataclass(frozen=True)
class Served:
    """A model that is ready to serve, and what it may use."""

    model: LanguageModel[Any]
    tokenizer: Tokenizer
    draft_model: LanguageModel[Any] | None
    config: EngineConfig  # with the chunk that memory allows
    memory: MemoryModel | None  # None where another definition's memory is not known
    ledger: Ledger
    prefixes: PrefixCache[Any] | None
    token_texts: TokenTexts
    row_exactness: str | None
    features: ImageFeatures | None  # of images; None for a model of text alone

    @property
    def tower(self) -> VisionTower | None:
        """What reads images; None for a model of text alone."""
        return find_tower(self.model)

    @property
    def context_size(self) -> int:
        """The most positions of a sequence."""
        own = self.model.config.context_size
        return own if self.config.max_context is None else min(own, self.config.max_context)

    @property
    def kind(self) -> tuple[object, ...]:
        """All that a cache's content depends on beside the model and the tokens."""
        config = self.config
        packing = (config.kv_bits, config.kv_group_size, config.quantized_kv_start)
        return (config.max_kv_size, *(packing if config.kv_bits else ()))

    def make_caches(self) -> list[Any]:
        """An empty cache per layer, for one sequence."""
        return make_cache_of(self.model, self.config)

    def make_proposer(self, request: Request) -> Proposer | None:
        """The proposer that a request asks for; None for none."""
        config = self.config
        wants_lookup = request.prompt_lookup
        if wants_lookup is None:
            wants_lookup = config.prompt_lookup
        if wants_lookup:
            return make_proposer(
                self.model, num_draft_tokens=config.num_draft_tokens, prompt_lookup=True
            )
        if self.draft_model is None or request.prompt_lookup is False:
            return None
        if request.images:
            logger.info("a request with images has no drafts: the draft model does not see them")
            return None
        return make_proposer(
            self.model, draft_model=self.draft_model, num_draft_tokens=config.num_draft_tokens
        )

    def needed_bytes(self, num_prompt: int, limit: int, images: ImagePrompt | None = None) -> Needs:
        """What a sequence can come to need.

        Raises: MemoryBudgetError when it would not fit even alone.
        """
        budget = self.ledger.budget
        if self.memory is None or budget is None:
            return Needs(0, 0, 0)
        kv_bytes = self.memory.kv_bytes
        features, encoding = self.memory.image_bytes(images)

        def fits(num_new: int) -> bool:
            return budget.fits_alone(kv_bytes(num_prompt + num_new + DRAFT_ROOM) + encoding)

        needed = kv_bytes(num_prompt + limit + DRAFT_ROOM)
        if not budget.fits_alone(needed + encoding):
            most = largest(fits, 1, limit)
            parts = {"keys and values": needed, "images": encoding}
            raise refuse(budget, parts, largest_max_tokens=most)
        return Needs(needed + encoding, needed + features, needed)


def open_model(model: str, config: EngineConfig, options: Mapping[str, Any]) -> Served:
    """Load a model by its name or folder, in this thread."""
    loaded, tokenizer = load(model, **options)
    return serve(loaded, tokenizer, config)


def serve(model: LanguageModel[Any], tokenizer: Tokenizer, config: EngineConfig) -> Served:
    """Everything around a loaded model.

    Raises: InvalidRequestError for what does not fit together, MemoryBudgetError where the model alone is too much.
    """
    caches = make_cache_of(model, config)  # what the model cannot serve is said now
    limit_mlx_cache()
    draft_model = None
    if config.draft_model is not None:
        draft_model, other = load(config.draft_model)
        check_same_vocabulary(tokenizer, other, config.draft_model)
        make_proposer(model, draft_model=draft_model, num_draft_tokens=config.num_draft_tokens)
    if draft_model is not None or config.prompt_lookup:
        check_trimmable(model, caches)
    memory = _measure(model, config, draft_model)
    budget = None
    if memory is not None:
        memory, budget = _fit_chunk(memory, config)
        config = replace(config, prefill_chunk=memory.options.prefill_chunk)
    prefixes = _make_prefixes(model, config, budget)
    features = _make_features(model, config, budget)
    return Served(
        model,
        tokenizer,
        draft_model,
        config,
        memory,
        Ledger(budget, prefixes, features),
        prefixes,
        TokenTexts(tokenizer),
        row_is_exact(model),
        features,
    )


def evaluate(model: LanguageModel[Any]) -> None:
    """Compute whatever a model still holds lazily, so that another thread may use it."""
    if isinstance(model, Decoder):
        mx.eval(list(find_arrays(model)))
    else:  # another definition keeps its arrays where it likes; a step brings them all in
        mx.eval(model(mx.zeros((1, 1), mx.int32)))


def _measure(
    model: LanguageModel[Any], config: EngineConfig, draft_model: LanguageModel[Any] | None
) -> MemoryModel | None:
    try:
        return MemoryModel.of(model, config, draft_model=draft_model)
    except InvalidRequestError:
        if config.memory_budget_bytes is not None or isinstance(model, Decoder):
            raise
        return None


def _fit_chunk(memory: MemoryModel, config: EngineConfig) -> tuple[MemoryModel, MemoryBudget]:
    """The budget, and the memory with a chunk that is halved until activations take half of what weights leave."""
    total = config.memory_budget_bytes or default_budget_bytes()
    chunk = config.prefill_chunk
    while True:
        memory = replace(memory, options=replace(config, prefill_chunk=chunk))
        standing = memory.standing()
        left = total - sum(standing.values())
        if left > standing["activations"] or chunk <= SMALLEST_CHUNK:
            break
        chunk = max(SMALLEST_CHUNK, chunk // 2)
    if chunk < config.prefill_chunk:
        logger.warning("prompts are read %d tokens at a time, for want of memory", chunk)
    budget = MemoryBudget(total, standing)
    if budget.available == 0:
        raise MemoryBudgetError(f"the model takes all of the budget of {total} bytes; raise it")
    return memory, budget


def _make_prefixes(
    model: LanguageModel[Any], config: EngineConfig, budget: MemoryBudget | None
) -> PrefixCache[Any] | None:
    limit = config.prefix_cache_bytes
    if limit is None:
        limit = 0 if budget is None else budget.available // 4
    if not limit:
        return None
    disk = None
    if config.prefix_cache_dir is not None:
        if not isinstance(model, Decoder):
            raise InvalidRequestError("prefix_cache_dir is for models that are defined here")
        disk = PrefixDisk(Path(config.prefix_cache_dir), config.prefix_disk_bytes, model)
    return PrefixCache(limit, disk)


def _make_features(
    model: LanguageModel[Any], config: EngineConfig, budget: MemoryBudget | None
) -> ImageFeatures | None:
    tower = find_tower(model)
    limit = config.image_cache_bytes
    if limit is None:
        limit = 0 if budget is None else budget.available // 16
    return None if tower is None else ImageFeatures(tower, limit)


Loader = Callable[[], Served]
