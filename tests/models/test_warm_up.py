"""Warming up launches what the first tokens will launch, and leaves nothing behind."""

import mlx.core as mx

import mlx_edge
from mlx_edge import ops
from mlx_edge.models.warm_up import LONG, warm_up


def test_every_kernel_of_decoding_runs_once_before_it_is_needed() -> None:
    with ops.use("reference"):
        model, _ = mlx_edge.load()
        seen: list[tuple[int, int]] = []

        def note(op, _backend, compute, args, _kwargs):  # type: ignore[no-untyped-def]
            if op == "attention_block":
                seen.append((args[4].starts[0], args[4].width))
            return compute()

        with ops.observe(note):
            assert warm_up(model) > 0
    layers = len(model.layers)
    assert seen == [(0, 1)] * layers + [(LONG, 1)] * layers
    assert mx.isfinite(model(mx.array([[1]]))).all().item()
