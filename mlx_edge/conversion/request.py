"""What is asked of a conversion, checked as far as it can be without looking at a model."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import mlx.core as mx

from mlx_edge.conversion.pipeline import Progress, Rounding
from mlx_edge.conversion.recipes import RECIPES
from mlx_edge.errors import InvalidRequestError
from mlx_edge.quant import MODES, Packing

Action = Literal["copy", "quantize", "dequantize", "realign"]
Method = Literal["rtn", "gptq", "awq", "dwq", "smooth"]
METHODS: tuple[Method, ...] = get_args(Method)

# A bar: what is done now, and in what it is counted ("B" for bytes).
Bars = Callable[[str, str], Progress]


@dataclass(frozen=True)
class TextRequest:
    """Which text calibrates and measures, and how much of it."""

    source: str | None = None  # a file or a data set of the hub; None: the built-in text
    num_samples: int = 64  # rows that calibrate; a quarter as many measure
    sequence_length: int | None = None  # None: 256, or the model's context where that is shorter
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """What a conversion shall do. `copy` casts floats and leaves packed weights as they are."""

    action: Action = "copy"
    packing: Packing = field(
        default_factory=lambda: Packing(64, 4)
    )  # of every layer, with quantize
    recipe: str | None = None  # of `recipes.RECIPES`, in place of one packing for all
    target_bpw: float | None = (
        None  # real bits per weight of linears, embedding and head: allocated by measure
    )
    max_kl: float | None = None  # nats per token, the sum of the layers' measured damages
    sensitivities: Path | None = None  # a table that was measured before, or where to keep it
    dtype: mx.Dtype | None = (
        None  # of floats and scales; None: what config.json says, else as they are
    )
    method: Method = "rtn"
    rounding: Rounding = field(default_factory=Rounding)
    has_static_inputs: bool = False  # inputs of linears in int8 steps that the text has fixed
    text: TextRequest = field(default_factory=TextRequest)
    has_receipt: bool = True
    max_shard_bytes: int = 5 * 10**9

    def __post_init__(self) -> None:
        """Raises: InvalidRequestError for what does not go together."""
        ways = [self.recipe is not None, self.target_bpw is not None, self.max_kl is not None]
        if sum(ways) > 1:
            _refuse("--quant-predicate, --target-bpw and --max-kl exclude each other; give one")
        if self.action != "quantize" and (any(ways) or self.method != "rtn"):
            _refuse("--quant-predicate, --target-bpw, --max-kl and --method need -q")
        if self.action != "quantize" and self.has_static_inputs:
            _refuse("--activations static needs -q")
        if self.recipe is not None and self.recipe not in RECIPES:
            _refuse(f"--quant-predicate {self.recipe}: expected one of {', '.join(RECIPES)}")
        if self.method not in METHODS:
            _refuse(f"--method {self.method}: expected one of {', '.join(METHODS)}")
        if self.packing.mode != "affine" and (any(ways) or self.method != "rtn"):
            _refuse(
                f"--q-mode {self.packing.mode} goes with plain rounding of all layers only; "
                "leave out --quant-predicate, --target-bpw, --max-kl and --method, or the mode"
            )
        if self.rounding != Rounding() and (self.method != "rtn" or self.packing.mode != "affine"):
            _refuse("--q-scheme and --q-per go with --method rtn and --q-mode affine only")
        if self.sensitivities is not None and not self.is_measured:
            _refuse("--sensitivities needs --target-bpw or --max-kl")
        bits, groups = MODES[self.packing.mode]
        if self.packing.bits not in bits or self.packing.group_size not in groups:
            _refuse(
                f"{self.packing.mode} has bits of {', '.join(map(str, sorted(bits)))} and groups of "
                f"{', '.join(map(str, sorted(groups)))}; found {self.packing}"
            )

    @property
    def is_measured(self) -> bool:
        """Whether bits are allocated by the measured damage of each layer."""
        return self.target_bpw is not None or self.max_kl is not None

    @property
    def needs_model(self) -> bool:
        """Whether the model must run before its weights can be written."""
        return self.method != "rtn" or self.is_measured or self.has_static_inputs

    def key(self) -> dict[str, Any]:
        """All that the written bytes depend on, besides the source."""
        return {part.name: str(getattr(self, part.name)) for part in fields(self)}


def _refuse(message: str) -> None:
    raise InvalidRequestError(message)
