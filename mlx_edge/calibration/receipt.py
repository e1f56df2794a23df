"""The receipt of a conversion: what it did to a model, measured, in `quality.json` beside the weights.

What was measured is the same whenever the same conversion is run again; time and memory, which are not, stand under
their own key. Imports no MLX and computes nothing: `measurement.py` does.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, get_args, get_type_hints

from mlx_edge.errors import ModelFormatError

FILE_NAME = "quality.json"
FORMAT_VERSION = 1
MAX_BYTES = 1 << 20
CONVERT_AGAIN = "convert the model again, or delete the file"


@dataclass(frozen=True)
class TextSource:
    """A text that calibrated or measured."""

    source: str  # a file's name, "built-in", or a data set of the hub
    sha256: str

    def __str__(self) -> str:
        return f"{self.source} (sha256 {self.sha256[:12]})"


@dataclass(frozen=True)
class Run:
    """What a conversion took; differs from run to run."""

    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Receipt:
    """What a conversion made of a model, and how far the result is from it.

    The figures from `kl_mean` to `perplexity_after` are None where nothing was measured; `reason` then says why.
    """

    mlx_edge_version: str  # that wrote it
    weights: str  # fingerprint of the weights that it is about
    model: str  # what was converted: the reference of the measures
    method: str  # rtn, gptq, awq, dwq, smooth, floats
    packing: str  # of most layers, in words
    num_exceptions: int  # layers packed otherwise, or kept as floats
    bits_per_weight: float  # of all tensors, with scales and offsets
    weights_bytes_before: int
    weights_bytes_after: int
    kl_mean: float | None  # KL(before || after), nats per token
    kl_p99: float | None
    top1_agreement: float | None  # 0 to 1
    perplexity_before: float | None
    perplexity_after: float | None
    num_tokens: int  # that were measured
    calibrated_on: TextSource | None  # None: the method needs no text
    measured_on: TextSource | None
    reason: str | None
    run: Run

    def to_json(self) -> str:
        """The content of `quality.json`."""
        return (
            json.dumps({"version": FORMAT_VERSION, **asdict(self)}, indent=2, allow_nan=False)
            + "\n"
        )

    @staticmethod
    def from_json(text: str, name: str = FILE_NAME) -> "Receipt":
        """From the content of `quality.json`; `name` says in messages where it stands.

        Raises: ModelFormatError for a field that is unknown, missing or no such value, and for another version.
        """
        try:
            raw = json.loads(text, parse_constant=lambda word: _fail(name, f"the number {word}"))
        except (ValueError, RecursionError):
            _fail(name, "no JSON")
        if not isinstance(raw, dict):
            _fail(name, "no object")
        version = raw.pop("version", None)
        if type(version) is int and version > FORMAT_VERSION:
            raise ModelFormatError(
                f"{name}: a receipt of version {version}, from a later mlx_edge; this one reads version "
                f"{FORMAT_VERSION}; update mlx_edge"
            )
        if version != FORMAT_VERSION or type(version) is not int:
            _fail(name, f"version {str(version)[:20]!r}, expected {FORMAT_VERSION}")
        receipt: Receipt = _read_record(Receipt, raw, name)
        receipt._check_whole(name)
        return receipt

    def _check_whole(self, name: str) -> None:
        """Every measure is there, or none and the reason."""
        measures = [self.kl_mean, self.kl_p99, self.top1_agreement, self.measured_on]
        measures += [self.perplexity_before, self.perplexity_after]
        wanted = {False} if self.reason is None else {True}
        if {measure is None for measure in measures} != wanted:
            _fail(name, "only some of its measures, or measures beside a reason why there are none")

    def summary(self) -> str:
        """The receipt in one line."""
        size = f"{self.bits_per_weight:.2f} bits/weight"
        if self.kl_mean is None or self.top1_agreement is None or self.measured_on is None:
            return f"{size}, not measured: {self.reason} ({self.method})"
        return (
            f"{size}, KL {_digits(self.kl_mean)} nats/token, top-1 {self.top1_agreement:.1%} "
            f"({self.method}, measured on {self.measured_on.source})"
        )

    def table(self) -> list[tuple[str, str]]:
        """Words and values, in the order to be read."""
        from mlx_edge.weights.report import format_bytes

        exceptions = f"; {self.num_exceptions} layers otherwise" if self.num_exceptions else ""
        share = self.weights_bytes_after / max(1, self.weights_bytes_before)
        rows = [
            ("Method", f"{self.method}, {self.packing}{exceptions}"),
            ("Bits per weight", f"{self.bits_per_weight:.3f}, scales counted"),
            (
                "Size",
                f"{format_bytes(self.weights_bytes_after)}, {share:.1%} of {format_bytes(self.weights_bytes_before)}",
            ),
            *self._measures(),
            ("Calibrated on", str(self.calibrated_on or "no text")),
            (
                "Conversion",
                f"{self.run.seconds:.1f} s, peak memory {format_bytes(self.run.peak_memory_bytes)}",
            ),
        ]
        return rows

    def _measures(self) -> list[tuple[str, str]]:
        if self.kl_mean is None:
            return [("Quality", f"not measured: {self.reason}")]
        assert (
            self.kl_p99 is not None and self.top1_agreement is not None
        )  # as `_check_whole` wants
        assert self.perplexity_before is not None and self.perplexity_after is not None
        change = self.perplexity_after / self.perplexity_before - 1
        return [
            ("KL divergence", f"{_digits(self.kl_mean)} nats/token, P99 {_digits(self.kl_p99)}"),
            ("Top-1 agreement", f"{self.top1_agreement:.2%}"),
            (
                "Perplexity",
                f"{self.perplexity_after:.4g}, before {self.perplexity_before:.4g} ({change:+.2%})",
            ),
            ("Measured on", f"{self.num_tokens} tokens of {self.measured_on}"),
        ]

    def lines(self) -> list[str]:
        """For a terminal."""
        rows = self.table()
        width = max(len(word) for word, _ in rows)
        return [f"{word:<{width}}  {value}" for word, value in rows]


def _digits(value: float) -> str:
    """Three significant digits, without an exponent down to a millionth."""
    if value == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}" if places <= 8 else f"{value:.2e}"


def read_receipt(folder: Path) -> Receipt | None:
    """The receipt in a model folder, None where there is none.

    Raises: ModelFormatError for one that cannot be read.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        text = raw.decode("utf-8")
    except (OSError, ValueError) as error:
        _fail(str(path), f"what cannot be read ({error})")
    if len(raw) > MAX_BYTES:
        _fail(str(path), f"more than {MAX_BYTES} bytes")
    return Receipt.from_json(text, str(path))


def write_receipt(folder: Path, receipt: Receipt) -> None:
    """Put the receipt beside the weights."""
    (folder / FILE_NAME).write_text(receipt.to_json(), "utf-8")


def _fail(name: str, found: str) -> NoReturn:
    raise ModelFormatError(f"{name}: found {found}; it is no receipt: {CONVERT_AGAIN}")


def _read_record(kind: type, raw: Mapping[str, Any], name: str) -> Any:
    """A dataclass from an object that has its fields, and no others."""
    wanted = [f.name for f in fields(kind)]
    unknown = sorted(str(key)[:40] for key in raw if key not in wanted)
    missing = [key for key in wanted if key not in raw]
    if unknown or missing:
        words = [f"unknown fields: {', '.join(unknown[:5])}"] if unknown else []
        words += [f"missing fields: {', '.join(missing[:5])}"] if missing else []
        _fail(name, " and ".join(words))
    hints = get_type_hints(kind)
    return kind(**{key: _read_value(hints[key], raw[key], key, name) for key in wanted})


def _read_value(hint: Any, value: Any, key: str, name: str) -> Any:
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if value is None and NoneType in kinds:
        return None
    kind = kinds[0]
    if kind in (TextSource, Run) and isinstance(value, dict):
        return _read_record(kind, value, f"{name}: {key}")
    if kind is float and type(value) in (int, float) and math.isfinite(value) and value >= 0:
        return float(value)
    if kind in (int, str) and type(value) is kind and (kind is str or value >= 0):
        return value
    _fail(name, f"{key} {str(value)[:40]!r}, expected {kind.__name__}")
