"""How much memory a model takes: weights, keys and values, the activations of a step, the process around them.

Arithmetic from a model's configuration and the headers of its files; nothing is loaded and nothing allocated. `plan.py`
prints it, the engine admits requests by it, `bench/memory_plan.py` holds it against measured processes. For the CPU
kernels every term was measured; for plain MLX ops and for Metal the activations are estimates. Sizes are in bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Protocol

from mlx_edge.cache import MAX_HEAD_DIM, QuantizedRows
from mlx_edge.engine.memory.budget import largest
from mlx_edge.engine.memory.kv_sizes import SLICE, ArraySizes, LayerCacheSizes, PagedSizes, RowSizes
from mlx_edge.engine.memory.machine import private_bytes
from mlx_edge.engine.memory.vision_sizes import VisionSizes
from mlx_edge.engine.memory.weight_sizes import Backend, WeightSizes, measure_weights
from mlx_edge.engine.scheduler import SMALL_STEP
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.config import ModelConfig
from mlx_edge.models.decoder import KEPT_PREFIX, Decoder
from mlx_edge.models.interface import CacheOptions
from mlx_edge.models.tensors import find_prefix, stored_name
from mlx_edge.models.vision.assembly import find_prefix as find_vision
from mlx_edge.models.vision.assembly import read_processor
from mlx_edge.models.vision.prompt import ImagePrompt
from mlx_edge.ops import uses_cpu_kernels, uses_metal_kernels
from mlx_edge.ops.reference_attention import SCORE_ELEMENTS
from mlx_edge.runtime import has_gpu
from mlx_edge.weights import Checkpoint
from mlx_edge.weights.dtypes import ELEMENT_TYPES

# An output of the CPU kernels from here on goes back to the system when it is dropped: LARGE of cpu_kernels/adopt.cpp.
LARGE = 1 << 17
SPARE_BYTES = 5 << 18  # of such outputs, kept for the next ones: SparePages there
LIVE_OUTPUTS = 3  # of the large: a block's input, its output, and one that was not yet given back
# Of freed outputs that MLX keeps once `limit_mlx_cache` has run; its own limit is 32 MiB.
MLX_CACHE_BYTES = 1 << 18
LOGIT_COPIES = 3  # logits, log-probabilities, what a sampler makes of them
TOKEN_BYTES = 64  # of the host's lists, for each token of a sequence


class MemoryOptions(CacheOptions, Protocol):
    """What the memory depends on beside the model; `EngineConfig` has it."""

    @property
    def max_batch_size(self) -> int:
        """Sequences at once."""

    @property
    def prefill_chunk(self) -> int:
        """Prompt tokens in a step."""


@dataclass(frozen=True)
class MemoryModel:
    """What one model takes on one backend."""

    backend: Backend
    config: ModelConfig
    options: MemoryOptions
    weights: WeightSizes
    layers: tuple[LayerCacheSizes, ...]
    input_groups: tuple[
        int, ...
    ] = ()  # group sizes for which the CPU kernels make int8 codes of a step's rows
    base_bytes: int = 0  # the process without weights: interpreter, MLX, tokenizer
    base_peak_bytes: int = 0  # the most that it took on the way there
    draft: "MemoryModel | None" = None
    vision: VisionSizes | None = None

    @classmethod
    def of(
        cls, model: Any, options: MemoryOptions, *, draft_model: Any | None = None
    ) -> "MemoryModel":
        """Of a loaded model, in the process that will run it: its base is what the process holds beside the weights.

        Raises: InvalidRequestError for a model of another definition (the bridge), whose caches are not known here,
        and for keys and values that cannot be packed as the options ask.
        """
        if not isinstance(model, Decoder):
            raise InvalidRequestError(
                f"{type(model).__name__} runs by another definition, whose memory is not known; give a memory budget "
                "only to models that are defined here"
            )
        folder = model.checkpoint.folder
        made = cls.of_folder(folder, options, **_how_loaded(model))
        base = max(0, private_bytes() - made.weights.private)
        if draft_model is not None:
            draft = cls.of(draft_model, options)
            made, base = replace(made, draft=draft), max(0, base - draft.weights.private)
        return replace(made, base_bytes=base, base_peak_bytes=base)

    @classmethod
    def of_folder(
        cls,
        folder: Path,
        options: MemoryOptions,
        *,
        backend: Backend | None = None,
        use_mmap: bool = True,
        can_keep_pack: bool = True,
    ) -> "MemoryModel":
        """Of a model folder, unread but for its headers; without a base. By default for the backend used here.

        Raises: ModelFormatError and UnsupportedModelError as loading would, InvalidRequestError as `of`.
        """
        backend = backend or backend_here()
        config = ModelConfig.from_folder(folder)
        with Checkpoint.open(folder, use_mmap=use_mmap) as checkpoint:
            weights = measure_weights(
                checkpoint,
                config,
                backend,
                use_mmap=use_mmap,
                can_keep_pack=can_keep_pack,
            )
            prefix = find_prefix(checkpoint.names(), config.family.embedding)
            norm = checkpoint.entry(f"{stored_name(config.family.final_norm, prefix)}.weight")
            element_bytes = ELEMENT_TYPES[norm.dtype].size
            vision = _measure_vision(
                checkpoint, config, backend, use_mmap=use_mmap, can_keep_pack=can_keep_pack
            )
        groups = {
            p.group_size
            for p in (config.quantization.default, *config.quantization.exceptions.values())
            if p
        }
        is_paged = backend == "cpu" and config.head_dim <= MAX_HEAD_DIM
        layers = _cache_sizes(
            config, options, backend, is_paged=is_paged, element_bytes=element_bytes
        )
        return cls(backend, config, options, weights, layers, tuple(sorted(groups)), vision=vision)

    def with_base(self, base_bytes: int, peak_bytes: int = 0) -> "MemoryModel":
        """The same in a process that holds so much before the weights come."""
        return replace(self, base_bytes=base_bytes, base_peak_bytes=max(base_bytes, peak_bytes))

    def with_draft(self, draft: "MemoryModel") -> "MemoryModel":
        """The same beside a draft model, which has a cache of its own for each sequence."""
        return replace(self, draft=draft)

    @property
    def weights_bytes(self) -> int:
        """Weights that are the process's own."""
        return self.weights.private + (self.draft.weights_bytes if self.draft else 0)

    @property
    def mapped_bytes(self) -> int:
        """Weights that are pages of files."""
        return self.weights.mapped + (self.draft.mapped_bytes if self.draft else 0)

    def kv_bytes(self, positions: int) -> int:
        """What one sequence of so many positions reserves at most, all layers, and the host's lists of its tokens."""
        if positions <= 0:
            return 0
        rows = min(max(self.options.prefill_chunk, SMALL_STEP), positions)  # drafts beside a token
        own = sum(layer.num_bytes(positions, rows) for layer in self.layers)
        own += TOKEN_BYTES * positions
        return own + (self.draft.kv_bytes(positions) if self.draft else 0)

    def step_bytes(self, rows: int, logit_rows: int, context: int = 0) -> int:
        """Activations and logits of a ragged step of `rows` tokens, `logit_rows` of them with logits.

        `context` is that of the longest sequence: plain MLX ops write attention's scores down.
        """
        logits = LOGIT_COPIES * 4 * logit_rows * self.config.vocab_size
        inner = (
            self._kernel_bytes(rows) if self.backend == "cpu" else self._array_bytes(rows, context)
        )
        own = logits + inner
        return max(own, self.draft.step_bytes(rows, logit_rows, context)) if self.draft else own

    def image_bytes(self, images: ImagePrompt | None) -> tuple[int, int]:
        """What a prompt's images take as features, and what until they are encoded, beyond a step's activations."""
        if self.vision is None or images is None:
            return 0, 0
        counts = [prod(span.patches.grid) for span in images.spans]
        return self.features_and_encoding(counts)

    def features_and_encoding(self, images: Sequence[int]) -> tuple[int, int]:
        """The same for images of so many patches each; steps and the tower never run at the same time."""
        assert self.vision is not None
        features = sum(map(self.vision.feature_bytes, images))
        batch = self.options.max_batch_size
        step = self.step_bytes(self.options.prefill_chunk + batch, batch)
        encoding = self.vision.encoding_bytes(images)
        return features, max(features, encoding - step)

    def largest_rows(self, free: int, logit_rows: int) -> int:
        """The longest step, at most `prefill_chunk` prompt tokens beside `logit_rows`, that fits into `free`."""
        most = self.options.prefill_chunk + logit_rows
        return max(0, largest(lambda rows: self.step_bytes(rows, logit_rows) <= free, 1, most))

    def peak_bytes(self, context: int, batch_size: int) -> int:
        """The process's private memory at its most, with `batch_size` sequences of `context` positions each."""
        running = self.base_bytes + self.weights_bytes + batch_size * self.kv_bytes(context)
        return max(self.base_peak_bytes, running + self.largest_step_bytes(context, batch_size))

    def largest_step_bytes(self, context: int, batch_size: int) -> int:
        """The largest step on the way there: a chunk of prompts beside a token of each other sequence.

        A context's last token is chosen and never read, so a sequence brings one fewer at most.
        """
        readable = batch_size * max(1, context - 1)
        rows = min(self.options.prefill_chunk + batch_size - 1, readable)
        return self.step_bytes(rows, batch_size, context)

    def standing(self) -> dict[str, int]:
        """What is held whatever runs, by name: for `MemoryBudget`. Mapped weights count: without them nothing runs."""
        batch = self.options.max_batch_size
        step = self.step_bytes(self.options.prefill_chunk + batch, batch)
        weights = self.weights_bytes + self.mapped_bytes
        held = {"weights": weights, "activations": step, "program": self.base_bytes}
        if self.vision is not None:
            held["waiting images"] = self.vision.room_bytes
        return held

    def _kernel_bytes(self, rows: int) -> int:
        """The CPU kernels' outputs in MLX's memory, and their scratch memory, which has at most a slice of rows."""
        num_outputs, row = 2 * self.config.num_layers + 2, 4 * self.config.hidden_size
        # MLX allocates all outputs of a step before the first is computed. Large ones are no memory until then, and go
        # back at once, so a shorter step, as the end of a prompt is, may hold more than a long one.
        small_rows = min(rows, (LARGE - 1) // row)
        outputs = row * max(num_outputs * small_rows, LIVE_OUTPUTS * rows)
        if rows * row >= LARGE:
            outputs += rows * row * min(num_outputs, SPARE_BYTES // (rows * row))
        return outputs + min(rows, SLICE) * self._scratch_per_row() + MLX_CACHE_BYTES

    @property
    def _inner_size(self) -> int:
        """Elements between the two halves of a feed-forward layer, of all experts that a row goes through."""
        config, experts = self.config, self.config.experts
        if experts is None:
            return config.intermediate_size
        chosen = experts.top_k * experts.inner_size
        return chosen if all(experts.layers) else max(chosen, config.intermediate_size)

    def _scratch_per_row(self) -> int:
        config = self.config
        query, key = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        hidden, inner = config.hidden_size, self._inner_size
        floats = hidden + (query + 2 * key) + query + 2 * inner + config.head_dim
        codes = sum(
            size + 8 * size // group
            for group in self.input_groups
            for size in (max(hidden, query), inner)
        )
        return 4 * floats + codes

    def _array_bytes(self, rows: int, context: int) -> int:
        """An estimate: a layer's arrays as MLX's ops make them one after another, and attention's scores."""
        config = self.config
        element = 4 if self.backend == "plain" else 2
        query, key = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        widest = max(4 * self._inner_size, 3 * query + 4 * key)
        scores = (
            min(rows * config.num_heads * context, SCORE_ELEMENTS) if self.backend == "plain" else 0
        )
        return element * rows * (4 * config.hidden_size + widest) + 3 * element * scores


def limit_mlx_cache() -> None:
    """On a CPU, let MLX keep little of what steps have freed: they have many sizes, which it would keep up to 32 MiB.

    For a process that serves; the C library finds the memory again as fast. A GPU's cache is left as it is.
    """
    if not has_gpu():
        import mlx.core as mx

        mx.set_cache_limit(MLX_CACHE_BYTES)


def backend_here() -> Backend:
    """What computes on this machine."""
    if uses_metal_kernels():
        return "metal"
    return "cpu" if uses_cpu_kernels() else "plain"


def _measure_vision(
    checkpoint: Checkpoint, config: ModelConfig, backend: Backend, **how: bool
) -> VisionSizes | None:
    if config.vision is None:
        return None
    prefix = find_vision(checkpoint.names())
    weights = measure_weights(checkpoint, config, backend, prefix=prefix, **how)
    processor = read_processor(checkpoint.folder, config.vision)
    return VisionSizes(config.vision, processor, weights, backend)


def _how_loaded(model: Decoder) -> dict[str, Any]:
    report = model.load_report
    packed = report.packed
    return {
        "use_mmap": report.shared_bytes > 0 or packed is not None,
        "can_keep_pack": packed is None or packed.how != "packed",
    }


def _cache_sizes(
    config: ModelConfig,
    options: MemoryOptions,
    backend: Backend,
    *,
    is_paged: bool,
    element_bytes: int,
) -> tuple[LayerCacheSizes, ...]:
    """As `Decoder.make_cache` makes them."""
    bits = options.kv_bits or 0
    if bits:
        QuantizedRows(bits, options.kv_group_size).check(config.head_dim)
    if backend == "plain":
        element_bytes = 4
    rows = RowSizes(
        config.num_kv_heads,
        config.head_dim,
        element_bytes,
        bits,
        options.kv_group_size if bits else 0,
        4 if backend != "metal" else element_bytes,
    )
    limit = None if options.max_kv_size is None else options.max_kv_size - KEPT_PREFIX
    kind: type[PagedSizes | ArraySizes] = PagedSizes if is_paged else ArraySizes
    made: list[LayerCacheSizes] = []
    for layer in config.layers:
        is_limited = limit is not None and (layer.window is None or layer.window > limit)
        window, keep = (limit, KEPT_PREFIX) if is_limited else (layer.window, 0)
        made.append(kind(rows, window, keep, options.quantized_kv_start if bits else 0))
    return tuple(made)
