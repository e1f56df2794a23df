"""From the records of all rounds to ratios: pure arithmetic, no process is started here.

A ratio is made within a round, ours / theirs, and the figure is its median over rounds. A peer with several settings is
taken at its best one: the setting whose median over all rounds is best for that very measurement. Where a key stands
for several measurements (prompts of 128 and 512, depths 0 and 2048) it is the one that is worst for us.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]  # round, job, shape, threads, peer, values, error
PREFILL, DECODE = "prefill_", "decode_"
OURS, AGAIN, LLAMA, OPENVINO, MLXLM = (
    "mlx_edge",
    "mlx_edge again",
    "llama.cpp",
    "OpenVINO",
    "mlx-lm",
)


@dataclass(frozen=True)
class Figure:
    """One key of the summary: the ratio of each round, or why there is none."""

    ratios: tuple[float, ...] = ()
    note: str = ""

    @property
    def median(self) -> float | None:
        """The flat value; None without rounds."""
        return statistics.median(self.ratios) if self.ratios else None


@dataclass(frozen=True)
class Series:
    """What one peer's setting gave for one measurement: round -> value."""

    peer: str
    values: Mapping[int, float]

    @property
    def median(self) -> float:
        """Over rounds."""
        return statistics.median(self.values.values())


class Rounds:
    """All records of a run, asked by shape, threads, peer and measurement."""

    def __init__(self, records: Iterable[Record]):
        self.records = list(records)

    def series(self, shape: str, peer: str, name: str, threads: int = 2) -> Series:
        """One setting of a peer, by its full name."""
        found = {
            record["round"]: record["values"][name]
            for record in self.records
            if (record["shape"], record["peer"], record["threads"]) == (shape, peer, threads)
            and name in record["values"]
        }
        return Series(peer, found)

    def peers(self, shape: str, family: str, threads: int = 2) -> list[str]:
        """The full names of a peer's settings, in the order of their first run."""
        names = [r["peer"] for r in self.records if r["shape"] == shape and r["threads"] == threads]
        fits = [n for n in dict.fromkeys(names) if n == family or n.startswith(family + " ")]
        return [name for name in fits if family != OURS or name == OURS]

    def measurements(self, shape: str, kind: str, threads: int = 2) -> list[str]:
        """The names of ours that begin with `kind` and a number."""
        names = dict.fromkeys(
            name
            for record in self.records
            if (record["shape"], record["peer"], record["threads"]) == (shape, OURS, threads)
            for name in record["values"]
        )
        return [n for n in names if n.startswith(kind) and n.removeprefix(kind).isdigit()]

    def best(
        self, shape: str, family: str, name: str, threads: int = 2, *, score: str = "rate"
    ) -> Series | None:
        """The peer's best setting: most tokens per second, most bytes per second ("gbs"), or least ("least")."""
        every = [self.series(shape, p, name, threads) for p in self.peers(shape, family, threads)]
        every = [series for series in every if series.values]
        if score == "gbs":
            every = [self.in_gbs(shape, series) for series in every]
        choose = min if score == "least" else max
        return choose(every, key=lambda series: series.median) if every else None

    def fastest(self, shape: str, family: str, kind: str) -> Series | None:
        """A peer's best rate of a kind, at whatever number of tokens it was measured."""
        names = dict.fromkeys(n for r in self.records for n in r["values"] if n.startswith(kind))
        every = [self.best(shape, family, name) for name in names]
        found = [series for series in every if series is not None]
        return max(found, key=lambda series: series.median) if found else None

    def in_gbs(self, shape: str, series: Series) -> Series:
        """Tokens per second as bytes of weights read per second, in 10^9."""
        gigabytes = self.weight_bytes(shape, series.peer) / 1e9
        return Series(series.peer, {r: v * gigabytes for r, v in series.values.items()})

    def weight_bytes(self, shape: str, peer: str) -> float:
        """Bytes of weights that a step of one token reads."""
        return self.series(shape, peer, "weight_bytes").median

    def why_not(self, shape: str, family: str, threads: int = 2) -> str:
        """The reason that a peer has no value."""
        for record in self.records:
            is_it = record["peer"] == family or record["peer"].startswith(family + " ")
            if (
                record["shape"] == shape
                and record["threads"] == threads
                and is_it
                and record["error"]
            ):
                return f"{record['peer']}: {record['error']}"
        return f"{family} was not run here"


def compare(ours: Series, theirs: Series, note: str = "") -> Figure:
    """Ours / theirs in each round that has both."""
    shared = [r for r in ours.values if theirs.values.get(r)]
    text = f"against {theirs.peer}{note}"
    if not shared:
        return Figure(note=f"{text}: no round has both")
    return Figure(tuple(ours.values[r] / theirs.values[r] for r in shared), text)


def rate(rounds: Rounds, shape: str, kind: str, family: str, score: str = "rate") -> Figure:
    """A rate against a peer's best; of several measurements the one that is worst for us."""
    figures = []
    for name in rounds.measurements(shape, kind):
        theirs = rounds.best(shape, family, name, score=score)
        if theirs is None and family == MLXLM:  # too slow for the same number of tokens
            theirs = rounds.fastest(shape, family, kind)
        if theirs is None or (score == "gbs" and name != DECODE + "0"):
            continue
        ours = rounds.series(shape, OURS, name)
        ours = rounds.in_gbs(shape, ours) if score == "gbs" else ours
        if (figure := compare(ours, theirs, f", {name}")).ratios:
            figures.append(figure)
    if not figures:
        return Figure(note=_missing(rounds, shape, family))
    return min(figures, key=lambda figure: figure.median or 0.0)


def _missing(rounds: Rounds, shape: str, family: str) -> str:
    has_ours = bool(rounds.measurements(shape, DECODE) or rounds.measurements(shape, PREFILL))
    return rounds.why_not(shape, family if has_ours else OURS)


def stream_fraction(rounds: Rounds, shape: str) -> Figure:
    """Bytes of weights read per second in decoding / what the memory reader got in the same round."""
    ours = rounds.series(shape, OURS, DECODE + "0")
    stream = rounds.series(shape, "STREAM", "gbs")
    if not ours.values or not stream.values:
        return Figure(note=rounds.why_not(shape, OURS if stream.values else "STREAM"))
    return compare(rounds.in_gbs(shape, ours), stream)


def cold(rounds: Rounds, shape: str) -> Figure:
    """First token of a new process / that of llama.cpp with its defaults, the faster of its files."""
    ours = rounds.series(shape, OURS + " cold", "first_token_s")
    theirs = rounds.best(shape, LLAMA + " cold default", "first_token_s", score="least")
    if not ours.values or theirs is None:
        return Figure(note=rounds.why_not(shape, OURS + " cold" if theirs else LLAMA + " cold"))
    return compare(ours, theirs)


def memory(rounds: Rounds, shape: str, cache_bytes: Callable[[str, int], int]) -> Figure:
    """Peak resident memory / (weights + 16-bit cache of the deepest measurement)."""
    ours = rounds.series(shape, OURS, "peak_bytes")
    ratios = []
    for number, peak in ours.values.items():
        record = next(
            r
            for r in rounds.records
            if r["round"] == number and r["peer"] == OURS and r["shape"] == shape
        )
        longest = [
            int(n.split("_")[1]) for n in record["values"] if n.startswith((PREFILL, DECODE))
        ]
        needed = rounds.weight_bytes(shape, OURS) + cache_bytes(shape, max(longest, default=0))
        ratios.append(peak / needed)
    if not ratios:
        return Figure(note=rounds.why_not(shape, OURS))
    return Figure(tuple(ratios), "VmHWM / (weights + cache)")


def ngram(rounds: Rounds, shape: str, texts: Sequence[str]) -> Figure:
    """Seconds of plain steps / seconds with n-gram speculation, the same text; the worst of the texts."""
    figures = []
    for text in texts:
        plain = rounds.series(shape, OURS + " replay", f"replay_{text}_plain_seconds")
        fast = rounds.series(shape, OURS + " replay", f"replay_{text}_ngram_seconds")
        figure = compare(plain, fast)
        if not figure.ratios:
            return Figure(note=rounds.why_not(shape, OURS + " replay"))
        figures.append(Figure(figure.ratios, text))
    return min(figures, key=lambda figure: figure.median or 0.0)


def summarize(
    rounds: Rounds, shapes: Mapping[str, str], cache_bytes: Callable[[str, int], int]
) -> dict[str, Figure]:
    """Every key of the summary; `shapes` names the shape of "1b" and of "06b"."""
    big, small = shapes["1b"], shapes["06b"]
    return {
        "prefill_vs_llamacpp_1b": rate(rounds, big, PREFILL, LLAMA),
        "decode_vs_llamacpp_1b": rate(rounds, big, DECODE, LLAMA),
        "decode_gbs_vs_llamacpp_1b": rate(rounds, big, DECODE, LLAMA, "gbs"),
        "prefill_vs_llamacpp_06b": rate(rounds, small, PREFILL, LLAMA),
        "decode_vs_llamacpp_06b": rate(rounds, small, DECODE, LLAMA),
        "prefill_vs_openvino_1b": rate(rounds, big, PREFILL, OPENVINO),
        "decode_vs_openvino_1b": rate(rounds, big, DECODE, OPENVINO),
        "decode_vs_mlxlm_1b": rate(rounds, big, DECODE, MLXLM),
        "prefill_vs_mlxlm_1b": rate(rounds, big, PREFILL, MLXLM),
        "decode_fraction_of_stream_1b": stream_fraction(rounds, big),
        "cold_first_token_vs_llamacpp": cold(rounds, big),
        "peak_memory_over_weights": memory(rounds, big, cache_bytes),
        "ngram_speedup_repetitive": ngram(rounds, big, ("code_edit", "json_list")),
        "ngram_ratio_plain_text": ngram(rounds, big, ("prose",)),
    }


def null_runs(rounds: Rounds, shape: str) -> dict[str, Figure]:
    """Ours against ours, for every kind of figure: what noise alone makes."""
    nulls = {}
    for kind in (PREFILL, DECODE):
        for name in rounds.measurements(shape, kind):
            again = rounds.series(shape, AGAIN, name)
            nulls[name] = compare(rounds.series(shape, OURS, name), again)
    pairs = {
        "peak_bytes": (OURS, AGAIN, "peak_bytes"),
        "cold_first_token": (OURS + " cold", AGAIN + " cold", "first_token_s"),
        "stream": ("STREAM", "STREAM again", "gbs"),
    }
    for key, (first, second, name) in pairs.items():
        nulls[key] = compare(rounds.series(shape, first, name), rounds.series(shape, second, name))
    plain = rounds.series(shape, OURS + " replay", "replay_prose_plain_seconds")
    nulls["replay"] = compare(
        plain, rounds.series(shape, AGAIN + " replay", "replay_prose_plain_seconds")
    )
    return {key: figure for key, figure in nulls.items() if figure.ratios}
