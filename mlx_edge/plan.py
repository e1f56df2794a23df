"""`python -m mlx_edge.plan`: what a model will take in memory, and what fits beside it, before its weights are loaded.

Reads flags and prints; the arithmetic is the engine's own (`engine/memory/`). The tokenizer is loaded, so that the
program's share is measured where it can be.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_edge.command import Parser, integer, run_command
from mlx_edge.errors import InvalidRequestError
from mlx_edge.options import add_memory

if TYPE_CHECKING:
    from mlx_edge.engine.memory.machine import Machine
    from mlx_edge.engine.memory.model import MemoryModel

PROG = "mlx_edge.plan"
MAX_BATCH = 4096
KERNELS = {"cpu": "CPU kernels", "metal": "Metal kernels", "plain": "plain MLX ops"}


def make_parser() -> Parser:
    """All flags."""
    parser = Parser(prog=PROG, description="Say how much memory a model takes, before loading it.")
    add = parser.add_argument
    add("model", nargs="?", default="pocket", help="a folder, a hub id (owner/name), or pocket")
    add("--revision", help="branch, tag or commit of a hub model")
    add("--context", type=integer(1), help="tokens of a sequence (default: the model's context)")
    add("--batch", type=integer(1, MAX_BATCH), default=1, help="sequences at once")
    add("--prefill-chunk", type=integer(1), default=512, help="prompt tokens in one step")
    add("--images", type=integer(0), help="images of a sequence (default: 1 where the model sees)")
    add("--max-pixels", type=integer(1), help="of an image (default: the model's own limit)")
    add("--draft-model", help="a smaller model that drafts tokens: a folder or a hub id")
    add_memory(parser)
    parser.set_defaults(quantized_kv_start=0)  # the engine's default
    add("--device", choices=tuple(KERNELS), help="what computes (default: what would here)")
    add("--machine", help="an Apple machine that is not at hand: 'M4 Max 64 GB'")
    add("--json", action="store_true", help="print JSON, sizes in bytes")
    return parser


@dataclass(frozen=True)
class MemoryPlan:
    """What is asked for, what it takes, and on which machine."""

    name: str
    memory: "MemoryModel"
    machine: "Machine"
    context: int
    batch_size: int
    quality: str | None
    images: int = 0  # of a sequence, in its context
    max_pixels: int | None = None

    @property
    def peak_bytes(self) -> int:
        """The process's private memory at its most."""
        return self._peak(self.context, self.batch_size)

    def _peak(self, context: int, batch_size: int) -> int:
        """All sequences keep features; one image at a time is encoded, and no step runs then."""
        peak = self.memory.peak_bytes(context, batch_size)
        return peak + self._image_bytes(context, batch_size)

    def _image_bytes(self, context: int, batch_size: int) -> int:
        """What images add to the same of text."""
        vision = self.memory.vision
        if vision is None or not self.images:
            return 0
        patches = vision.largest_image(self.max_pixels)
        features = batch_size * self.images * vision.feature_bytes(patches)
        step = self.memory.largest_step_bytes(context, batch_size)
        encoding = self.images * vision.patch_bytes(patches) + vision.tower_bytes(patches)
        return features + max(0, encoding - step)

    @property
    def total_bytes(self) -> int:
        """The same with the weights that are pages of files."""
        return self.peak_bytes + self.memory.mapped_bytes

    @property
    def fits(self) -> bool:
        """Whether the machine has the memory."""
        return self._fits(self.context, self.batch_size)

    @property
    def prefix_bytes(self) -> int:
        """What the engine's prefix cache may come to hold beside that, by default: a quarter of what weights leave."""
        left = self.machine.usable_bytes - sum(self.memory.standing().values())
        return max(0, left) // 4

    def longest_context(self) -> int:
        """The longest context, at most the model's, that fits at this batch; 0 when none does."""
        limit = self.memory.config.context_size
        return _search(lambda n: self._fits(n, self.batch_size), limit)

    def largest_batch(self) -> int:
        """The largest batch, at most MAX_BATCH, that fits at this context; 0 when none does."""
        return _search(lambda n: self._fits(self.context, n), MAX_BATCH)

    def _fits(self, context: int, batch_size: int) -> bool:
        peak = self._peak(context, batch_size) + self.memory.mapped_bytes
        return peak <= self.machine.usable_bytes

    def parts(self) -> dict[str, int]:
        """What the peak is made of; a start that needs more than what follows is in `starting`."""
        memory = self.memory
        parts = {
            "program": memory.base_bytes,
            "weights": memory.weights_bytes,
            "kv": self.batch_size * memory.kv_bytes(self.context),
            "activations": memory.largest_step_bytes(self.context, self.batch_size),
            "images": self._image_bytes(self.context, self.batch_size),
        }
        return {**parts, "starting": max(0, self.peak_bytes - sum(parts.values()))}

    def to_json(self) -> dict[str, Any]:
        """All figures, sizes in bytes."""
        machine = self.machine
        return {
            "model": self.name,
            "device": self.memory.backend,
            "machine": machine.name,
            "memory_bytes": machine.memory_bytes,
            "usable_bytes": machine.usable_bytes,
            "is_estimate": machine.is_estimate or self.memory.backend != "cpu",
            "context": self.context,
            "batch": self.batch_size,
            **{f"{name}_bytes": size for name, size in self.parts().items()},
            "kv_bytes_per_sequence": self.memory.kv_bytes(self.context),
            "peak_bytes": self.peak_bytes,
            "mapped_bytes": self.memory.mapped_bytes,
            "vision": self._vision_json(),
            "total_bytes": self.total_bytes,
            "prefix_cache_bytes": self.prefix_bytes,
            "fits": self.fits,
            "longest_context": self.longest_context(),
            "largest_batch": self.largest_batch(),
            "quality": self.quality,
        }

    def _vision_json(self) -> dict[str, int] | None:
        """The tower, and what the largest image costs; None for a model of text alone."""
        vision = self.memory.vision
        if vision is None:
            return None
        patches = vision.largest_image(self.max_pixels)
        tokens = vision.count_tokens(patches)
        return {
            "weights_private_bytes": vision.weights.private,
            "weights_mapped_bytes": vision.weights.mapped,
            "images": self.images,
            "image_pixels": patches * vision.config.patch_size**2,
            "image_tokens": tokens,
            "image_kv_bytes": self.memory.kv_bytes(tokens),
            "image_patch_bytes": vision.patch_bytes(patches),
            "image_feature_bytes": vision.feature_bytes(patches),
            "image_tower_bytes": vision.tower_bytes(patches),
        }

    def lines(self) -> list[str]:
        """For a terminal of 80 columns."""
        from mlx_edge.engine.memory.budget import format_size

        def row(name: str, size: int, note: str = "") -> str:
            return f"  {name:<27}{format_size(size):>9}   {note}".rstrip()

        parts, memory, machine = self.parts(), self.memory, self.machine
        sequences = f"{self.batch_size} x {format_size(memory.kv_bytes(self.context))}"
        notes = {"kv": f"{sequences}, {_kv_words(memory)}", "starting": "reading the tokenizer"}
        notes["images"] = f"{self.images} of a sequence, as large as may be"
        names = {"kv": "keys and values", "weights": "weights, private", "starting": "start"}
        is_estimate = machine.is_estimate or memory.backend != "cpu"
        return [
            f"{self.name}: context {self.context}, batch {self.batch_size}",
            f"on {machine.name}, {KERNELS[memory.backend]}{' (an estimate)' if is_estimate else ''}",
            "",
            *(row(names.get(p, p), size, notes.get(p, "")) for p, size in parts.items() if size),
            row("peak of the process", self.peak_bytes),
            row("weights, mapped from files", memory.mapped_bytes, "shared, read again at need"),
            row("together", self.total_bytes, self._verdict(format_size(machine.usable_bytes))),
            row("prefix cache, at most", self.prefix_bytes, "given up when requests need it"),
            *_vision_lines(self._vision_json(), format_size),
            "",
            f"  {_context_words(self)}",
            f"  {_batch_words(self)}",
            *(["", self.quality] if self.quality else []),
        ]

    def _verdict(self, usable: str) -> str:
        return f"{'fits' if self.fits else 'DOES NOT FIT'} into the {usable} that may be used"


def _context_words(plan: MemoryPlan) -> str:
    found = plan.longest_context()
    limit = ", the model's limit" if found == plan.memory.config.context_size else ""
    return f"longest context at batch {plan.batch_size}: {found or 'none'}{limit}"


def _batch_words(plan: MemoryPlan) -> str:
    found = plan.largest_batch()
    return f"largest batch at context {plan.context}: {'at least ' if found == MAX_BATCH else ''}{found or 'none'}"


def _vision_lines(vision: dict[str, int] | None, size: Callable[[int], str]) -> list[str]:
    if vision is None:
        return []
    weights = vision["weights_private_bytes"] + vision["weights_mapped_bytes"]
    return [
        "",
        f"  of the weights for images: {size(weights)}",
        f"  an image of {vision['image_pixels'] / 1e6:.2f} megapixels: {vision['image_tokens']} tokens, "
        f"{size(vision['image_kv_bytes'])} of keys and values,",
        f"    {size(vision['image_feature_bytes'])} until the prompt is read; {size(vision['image_patch_bytes'])} of "
        "pixels and",
        f"    {size(vision['image_tower_bytes'])} until it is encoded (lower: --max-pixels)",
    ]


def _kv_words(memory: "MemoryModel") -> str:
    options = memory.options
    kind = f"{options.kv_bits} bit" if options.kv_bits else "floats"
    limit = f", {options.max_kv_size} positions" if options.max_kv_size else ""
    return f"{kind}{limit}"


def _search(fits: Callable[[int], bool], high: int) -> int:
    from mlx_edge.engine.memory.budget import largest

    return largest(fits, 1, high)


def make_plan(args: Namespace) -> MemoryPlan:
    """What the flags ask for.

    Raises: as finding and opening a model does; InvalidRequestError for a context beyond the model's.
    """
    from mlx_edge.calibration.quality import describe_quality
    from mlx_edge.engine.memory.machine import find_machine, this_machine
    from mlx_edge.engine.memory.model import MemoryModel
    from mlx_edge.engine.memory.weight_sizes import Backend
    from mlx_edge.weights.hub import find_model

    machine = find_machine(args.machine) if args.machine else this_machine()
    folders = [find_model(args.model, revision=args.revision)]
    folders += [find_model(args.draft_model)] if args.draft_model else []
    options = _engine_options(args)
    backend: Backend | None = args.device or ("metal" if args.machine else None)
    models = [MemoryModel.of_folder(folder, options, backend=backend) for folder in folders]
    memory = models[0].with_draft(models[1]) if len(models) > 1 else models[0]
    limit = memory.config.context_size
    context = args.context or limit
    if context > limit:
        raise InvalidRequestError(
            f"--context is {context}, the model's context {limit}; give at most that"
        )
    memory = memory.with_base(*_measure_base(folders))
    name = folders[0].name if Path(args.model).is_dir() else args.model
    quality = describe_quality(folders[0])
    images = _count_images(args, memory)
    return MemoryPlan(name, memory, machine, context, args.batch, quality, images, args.max_pixels)


def _count_images(args: Namespace, memory: "MemoryModel") -> int:
    if memory.vision is not None:
        return 1 if args.images is None else int(args.images)
    if args.images or args.max_pixels:
        raise InvalidRequestError(
            "--images and --max-pixels are for models that see; leave them out"
        )
    return 0


def _engine_options(args: Namespace) -> Any:
    from mlx_edge.engine.config import EngineConfig

    return EngineConfig(
        max_batch_size=args.batch,
        prefill_chunk=args.prefill_chunk,
        kv_bits=args.kv_bits,
        kv_group_size=args.kv_group_size,
        quantized_kv_start=args.quantized_kv_start,
        max_kv_size=args.max_kv_size,
        draft_model=args.draft_model,
        max_pixels=args.max_pixels,
    )


def _measure_base(folders: list[Path]) -> tuple[int, int]:
    """Private bytes of a process with the engine and the tokenizers but no weights, and its peak so far."""
    import mlx_edge.engine.blocking  # noqa: F401 - its modules are what the process will hold
    from mlx_edge.engine.memory.machine import peak_private_bytes, private_bytes
    from mlx_edge.ops.cpu import trim_memory
    from mlx_edge.runtime import connect_blas
    from mlx_edge.text import load_tokenizer

    connect_blas()
    tokenizers = [load_tokenizer(folder) for folder in folders]
    peak = peak_private_bytes()
    trim_memory()
    held = private_bytes()
    del tokenizers
    return held, peak


def print_plan(args: Namespace) -> None:
    """Make the plan and print it."""
    plan = make_plan(args)
    if args.json:
        print(json.dumps(plan.to_json(), indent=1))
    else:
        print(*plan.lines(), sep="\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0, or 2 after a line that says what was wrong."""
    return run_command(PROG, lambda args: print_plan(make_parser().parse_args(args)), argv)


if __name__ == "__main__":
    sys.exit(main())
