"""Comparisons of two models against float64 numpy, which has all logits at once and no tricks."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_edge.calibration import comparison
from mlx_edge.calibration.comparison import compare, kl_divergence
from mlx_edge.errors import InvalidRequestError, ModelFormatError
from tests.calibration.pairs import change_weights, open_model, tiny_folder

ROWS = mx.random.randint(0, 131, (5, 17), key=mx.random.key(3)).astype(mx.int32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return tiny_folder(root / "a"), tiny_folder(root / "b", noise=0.03)


def log_probabilities(folder) -> np.ndarray:
    model = open_model(folder)
    logits = np.array(mx.concatenate(list(model.logits(model.run(ROWS)))), np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("piece", [1, 131 * 7, 1 << 20])
def test_every_figure_is_that_of_float64(folders, monkeypatch, piece) -> None:
    monkeypatch.setattr(comparison, "BLOCK_LOGITS", max(131, piece))
    monkeypatch.setattr(comparison, "PIECE_LOGITS", piece)
    found = compare(*map(open_model, folders), ROWS, top_k=4)
    p, q = map(log_probabilities, folders)
    kl = (np.exp(p) * (p - q)).sum(-1)
    assert found.num_tokens == 85
    np.testing.assert_allclose(found.kl, kl, rtol=1e-4, atol=1e-9)
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-4)
    assert found.kl_p99 == pytest.approx(np.sort(kl.reshape(-1))[-2:].mean(), rel=0.2)
    assert found.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-4)
    assert found.kl_max == pytest.approx(kl.max(), rel=1e-4)
    assert 0.05 < found.top1 < 1  # the noise is such that something differs
    assert found.top1 == (p.argmax(-1) == q.argmax(-1)).mean()
    tops = [np.argsort(-x, axis=-1)[..., :4] for x in (p, q)]
    assert found.topk == pytest.approx(
        np.mean(
            [len({*a} & {*b}) / 4 for a, b in zip(*(t.reshape(-1, 4) for t in tops), strict=True)]
        )
    )
    following = np.array(ROWS)[:, 1:, None]
    for perplexity, x in ((found.reference_perplexity, p), (found.other_perplexity, q)):
        expected = np.exp(-np.take_along_axis(x[:, :-1], following, -1).mean())
        assert perplexity == pytest.approx(expected, rel=1e-6)


def test_worst_tokens_are_the_largest_with_what_both_would_say(folders) -> None:
    found = compare(*map(open_model, folders), ROWS, num_worst=6)
    p, q = map(log_probabilities, folders)
    order = np.argsort(-found.kl.reshape(-1))[:6]
    assert [(w.row, w.column) for w in found.worst] == [divmod(int(i), 17) for i in order]
    rows = np.array(ROWS)
    for worst in found.worst:
        place = worst.row, worst.column
        assert worst.kl == found.kl[place]
        assert list(worst.context) == rows[worst.row, : worst.column + 1].tolist()
        assert worst.target == (None if worst.column == 16 else rows[worst.row, worst.column + 1])
        for choices, x in ((worst.reference, p[place]), (worst.other, q[place])):
            assert [c.token for c in choices] == np.argsort(-x)[:2].tolist()
            assert choices[0].probability == pytest.approx(np.exp(x.max()), rel=1e-4)


def test_a_model_equals_itself_exactly(folders) -> None:
    found = compare(*(open_model(folders[0]) for _ in range(2)), ROWS, with_own_errors=True)
    assert not found.kl.any()
    assert (found.kl_mean, found.kl_p99, found.kl_max, found.top1, found.topk) == (0, 0, 0, 1, 1)
    assert found.reference_perplexity == found.other_perplexity
    assert not any(found.layer_errors) and not any(found.own_errors)
    assert found.worst == ()


@pytest.mark.parametrize("scale", [1e-7, 1e-4, 1e-2, 1.0, 60.0])
def test_kl_keeps_its_digits_from_tiny_to_huge(scale) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20, 3000)) * 3
    other = logits + scale * rng.normal(size=logits.shape)
    p, q = (
        x
        - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - x.max(-1, keepdims=True)
        for x in (logits, other)
    )
    exact = (np.exp(p) * (p - q)).sum(-1)
    p32, q32 = p.astype(np.float32), q.astype(np.float32)
    found = kl_divergence(p32, q32)
    assert (found >= 0).all()
    # Below 1e-6 the logits themselves have no more digits in float32.
    np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-12)


def test_errors_of_layers_are_relative_and_per_token(folders) -> None:
    first, second = map(open_model, folders)
    seen = []
    found = compare(
        first, second, ROWS, with_own_errors=True, watch_layers=lambda i, a, b: seen.append(i)
    )
    assert seen == [0, 1, 2]

    def error(a: mx.array, b: mx.array) -> float:
        a, b = np.array(a, np.float64), np.array(b, np.float64)
        return (np.linalg.norm(a - b, axis=-1) / np.linalg.norm(a, axis=-1)).mean()

    a, b = first.embed(ROWS), second.embed(ROWS)
    expected, own = [error(a, b)], []
    for index in range(3):
        after = first.run_layer(first.read_layer(index), index, a)
        own.append(error(after, second.run_layer(second.read_layer(index), index, a)))
        a, b = after, second.run_layer(second.read_layer(index), index, b)
        expected.append(error(a, b))
    assert found.layer_errors == pytest.approx(expected, rel=1e-5)
    assert found.own_errors == pytest.approx(own, rel=1e-5)


def test_a_damaged_layer_is_found(tmp_path) -> None:
    first = tiny_folder(tmp_path / "a")
    second = tiny_folder(tmp_path / "b")
    change_weights(second, lambda name, w: w * 1.5 if "layers.1.mlp.down" in name else w)
    found = compare(open_model(first), open_model(second), ROWS, with_own_errors=True)
    assert found.layer_errors[:2] == (0, 0) and found.own_errors[0] == found.own_errors[2] == 0
    assert found.own_errors[1] > 0.01 and found.kl_mean > 0


def test_unlike_models_are_compared_by_what_they_say(tmp_path, folders) -> None:
    other = tiny_folder(tmp_path / "c", "qwen3-tied")
    deeper = open_model(other)
    deeper.config = replace(deeper.config, num_layers=2)
    steps = []
    found = compare(
        open_model(folders[0]),
        deeper,
        ROWS,
        with_own_errors=True,
        on_progress=lambda *s: steps.append(s),
    )
    assert found.layer_errors == found.own_errors == ()
    assert found.kl_mean > 0.1
    assert steps == [(i, 4) for i in range(1, 5)]


def test_vocabularies_of_two_lengths_are_compared_where_both_have_tokens(tmp_path, folders) -> None:
    padded = tmp_path / "padded"
    tiny_folder(padded)
    change_weights(padded, lambda _, w: mx.pad(w, ((0, 5), (0, 0))) if w.shape[0] == 131 else w)
    text = (padded / "config.json").read_text().replace('"vocab_size": 131', '"vocab_size": 136')
    (padded / "config.json").write_text(text)
    found = compare(open_model(folders[0]), open_model(padded), ROWS)
    assert found.kl_max < 1e-12 and found.topk == 1


def test_what_cannot_be_compared_is_said(tmp_path, folders) -> None:
    first, second = map(open_model, folders)
    with pytest.raises(InvalidRequestError, match=r"from 0 to 131; expected .* below 131"):
        compare(first, second, mx.array([[0, 131]], mx.int32))
    with pytest.raises(InvalidRequestError, match="top_k is 132, expected 1 to 131"):
        compare(first, second, ROWS, top_k=132)
    broken = tiny_folder(tmp_path / "nan")
    change_weights(broken, lambda _, w: w.at[0, 0].add(mx.nan) if w.shape[0] == 131 else w)
    with pytest.raises(ModelFormatError, match="the other model's logits hold NaN or infinity"):
        compare(first, open_model(broken), ROWS)
