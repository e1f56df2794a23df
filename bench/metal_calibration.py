"""Published points that the roofline is held against: MLX's own kernels, counted here, timed by others on their Macs.

The sources are issues and pull requests of MLX and other projects, read as excerpts. A point that the model misses by
more than TOLERANCE says so wherever a prediction is shown. Knows no kernel's launch: counts come by the point's key.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.metal_cases import Case, MLXAttention, MLXProduct, Route
from bench.metal_roofline import M3_MAX, M3_ULTRA, M4_PRO, M5_PRO, Chip, predict
from bench.metal_shapes import VALUE_BYTES, Heads, Matrix
from bench.metal_work import Work

TOLERANCE = 0.25
Works = Mapping[Case, Sequence[Work]]

WIDE = Matrix(24576, 4096)
DENSE = Matrix(25600, 5120)
TILED = Matrix(17408, 5120)
COUNTED_ROWS = 2048  # of these matrices: their threadgroups are alike, and none is cut along K
# A quarter of 32k positions with a quarter of the parts: from 8192 on MLX takes another kernel, newer than the figures.
QUARTER, PARTS = 8191, {1: 64, 4: 64, 8: 256}


@dataclass(frozen=True)
class Point:
    """A published figure, and how the model makes it from counts."""

    name: str
    source: str
    chip: Chip
    published: float
    cases: tuple[Case, ...]
    predict: Callable[[Works], float]


def _product(matrix: Matrix, rows: int, route: Route) -> MLXProduct:
    return MLXProduct(matrix, rows, route, 4, COUNTED_ROWS)


def seconds(works: Sequence[Work], chip: Chip) -> float:
    """Of dispatches, without what waiting costs: published loops overlap it."""
    return sum(predict(work, chip).total for work in works)


def _ratio(name: str, source: str, chip: Chip, published: float, over: Case, under: Case) -> Point:
    def ratio(works: Works) -> float:
        return seconds(works[over], chip) / seconds(works[under], chip)

    return Point(name, source, chip, published, (over, under), ratio)


def _milliseconds(name: str, source: str, chip: Chip, published: float, case: Case) -> Point:
    return Point(name, source, chip, published, (case,), lambda w: seconds(w[case], chip) * 1e3)


def _share_of_memory() -> Point:
    case = MLXProduct(DENSE, 1, "qmv", 8, COUNTED_ROWS)

    def share(works: Works) -> float:
        memory = sum(predict(work, M3_ULTRA).memory for work in works[case])
        return memory / seconds(works[case], M3_ULTRA)

    name = "qmv, 8 bits, share of the memory's speed"
    return Point(name, "jundot/omlx#2238", M3_ULTRA, 0.94, (case,), share)


def _attention_gbs(group: int, published: float) -> Point:
    heads = Heads(8 * group, 8, 128)
    case = MLXAttention(heads, 1, QUARTER, "sdpa_vector_2pass", PARTS[group] // 4)
    read = 4 * 2 * heads.num_kv_heads * QUARTER * heads.head_dim * VALUE_BYTES

    def gbs(works: Works) -> float:
        return read / (4 * seconds(works[case], M5_PRO)) / 1e9

    name = f"sdpa_vector_2pass, 32k positions, {group} heads a group, GB/s of keys and values"
    return Point(name, "ml-explore/mlx#4076", M5_PRO, published, (case,), gbs)


def make_points() -> list[Point]:
    """All of them."""
    one = _product(WIDE, 1, "qmv")
    wide = ((2, 1.03), (3, 1.22), (4, 1.47), (6, 2.07), (8, 2.69))
    return [
        _share_of_memory(),
        *(
            _ratio(
                f"qmv_wide, {rows} rows over one, 4096 x 24576",
                "ml-explore/mlx#3839",
                M4_PRO,
                published,
                _product(WIDE, rows, "qmv_wide"),
                one,
            )
            for rows, published in wide
        ),
        _ratio(
            "qmv for each of 8 rows over one (shape not published, that above taken)",
            "ml-explore/mlx#4265",
            M3_ULTRA,
            6.12,
            _product(WIDE, 8, "qmv"),
            one,
        ),
        *(_attention_gbs(group, gbs) for group, gbs in ((1, 281.0), (4, 264.0), (8, 190.0))),
        _milliseconds(
            "qmv, 5120 x 17408, ms",
            "ml-explore/mlx#3863",
            M3_MAX,
            0.129,
            _product(TILED, 1, "qmv"),
        ),
        _milliseconds(
            "qmm_t of 16 rows, 5120 x 17408, ms",
            "ml-explore/mlx#3863",
            M3_MAX,
            0.508,
            _product(TILED, 16, "qmm"),
        ),
    ]


def calibrate(points: Sequence[Point], works: Works) -> list[dict[str, str | float | bool]]:
    """A row for each point whose cases were counted: published, predicted, how far off, and whether that is too far."""
    rows: list[dict[str, str | float | bool]] = []
    for point in points:
        if any(case not in works for case in point.cases):
            continue
        predicted = point.predict(works)
        off = predicted / point.published - 1
        rows.append(
            {
                "point": point.name,
                "chip": point.chip.name,
                "source": point.source,
                "published": point.published,
                "predicted": round(predicted, 3),
                "off": round(off, 3),
                "is_missed": abs(off) > TOLERANCE,
            }
        )
    return rows
