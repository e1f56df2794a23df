"""A model rounded in memory is the model that round-to-nearest writes; a limit of damage is kept by measure."""

import mlx.core as mx
import pytest

from mlx_edge.calibration.comparison import compare
from mlx_edge.calibration.rounding import RoundedModel
from mlx_edge.calibration.text import Sample, Samples
from mlx_edge.conversion import calibrated
from mlx_edge.conversion.calibrated import open_model
from mlx_edge.conversion.converter import convert
from mlx_edge.conversion.request import Request
from mlx_edge.conversion.source import FolderSource
from mlx_edge.quant import Packing
from tests.conversion.folders import make_folder, run

ROWS = mx.random.randint(0, 60, (6, 24), key=mx.random.key(3)).astype(mx.int32)


@pytest.mark.parametrize("tied", [True, False])
def test_a_rounded_model_is_the_one_that_is_written(tmp_path, tied):
    source = make_folder(tmp_path / "a", tie_word_embeddings=tied)
    done = run(source, tmp_path / "m", action="quantize", packing=Packing(32, 4), dtype=mx.float16)
    packings = dict(done.plan.packings)
    with open_model(source) as model, open_model(done.folder) as written:
        found = compare(written, RoundedModel(model, packings, mx.float16), ROWS)
        assert found.kl_max < 1e-5  # norms are float16 in the one, float32 in the other
        last = list(packings)[-1]
        packings[last] = None
        kept = RoundedModel(model, packings, mx.float16)
        assert compare(written, kept, ROWS).kl_mean > found.kl_mean


def test_a_limit_of_damage_is_kept_where_the_sum_of_damages_is_not_the_damage(
    tmp_path, monkeypatch
):
    source = make_folder(tmp_path / "a")
    sample = Sample(ROWS, "rows", "0")
    request = Request(action="quantize", dtype=mx.float16, has_receipt=False)
    candidates = (Packing(32, 2), Packing(32, 4), Packing(32, 8))
    monkeypatch.setattr(calibrated, "CANDIDATES", candidates)
    with FolderSource(source) as opened, open_model(source) as model:

        def measure(limit: float, name: str) -> tuple[float, float]:
            asked = Request(**{**vars(request), "max_kl": limit})
            done = convert(opened, tmp_path / name, asked, samples=Samples(sample, sample))
            with open_model(done.folder) as written:
                return compare(model, written, ROWS).kl_mean, done.plan.bits_per_weight

        coarse, coarse_bits = measure(1e-2, "coarse")
        fine, fine_bits = measure(coarse / 20, "fine")
        assert coarse <= 1e-2 * 1.01 and fine <= coarse / 20 * 1.01
        assert coarse_bits < fine_bits <= 16.5
        # A table that promises too much is found out.
        honest = calibrated.allocate
        monkeypatch.setattr(
            calibrated,
            "allocate",
            lambda table, *, target_bpw, max_kl: honest(
                table, target_bpw=target_bpw, max_kl=None if max_kl is None else 20 * max_kl
            ),
        )
        assert measure(1e-3, "promised")[0] <= 1e-3 * 1.01
