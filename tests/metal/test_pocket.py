"""The bundled model decodes through the Metal kernels: the same tokens, on a GPU that is a program."""

import mlx.core as mx
import numpy as np

import mlx_edge
from mlx_edge import ops
from mlx_edge.ops import metal
from tests.test_pocket import PROMPT, TOKENS

NUM_TOKENS = 72  # two merges of the tail
MARGIN = 1e-4  # of the best logit over the second: nearer ones would be told apart by rounding


def test_greedy_tokens_through_the_kernels() -> None:
    launched: list[str] = []

    def note(op: str, backend: str, compute, args, kwargs):  # type: ignore[no-untyped-def]
        launched.append(f"{op} on {backend}")
        return compute()

    with ops.use("emulated"), ops.observe(note):
        model, tokenizer = mlx_edge.load()
        steps = list(mlx_edge.stream_generate(model, tokenizer, PROMPT, max_tokens=NUM_TOKENS))
    assert [step.token for step in steps] == TOKENS[:NUM_TOKENS]
    for step in steps:
        best = np.sort(np.array(step.logprobs))[-2:]
        assert best[1] - best[0] > MARGIN
    layers = len(model.layers)
    # The prompt has 7 rows, and is a step of the kernels too.
    assert launched.count("attention_block on emulated") == layers * NUM_TOKENS
    assert launched.count("mlp_block on emulated") == layers * NUM_TOKENS
    assert launched.count("head on emulated") == NUM_TOKENS


def test_drafts_are_verified_through_the_kernels() -> None:
    with ops.use("emulated"):
        model, tokenizer = mlx_edge.load()
        draft, _ = mlx_edge.load("pocket-draft")
        steps = mlx_edge.stream_generate(model, tokenizer, PROMPT, max_tokens=40, draft_model=draft)
        assert [step.token for step in steps] == TOKENS[:40]


def test_a_layer_is_the_reference_with_a_window_a_prefix_and_packed_rows() -> None:
    from mlx_edge.cache import KVCache, QuantizedRows, prepare_step
    from tests.metal.layers import make_layer

    kinds = [
        {},
        {"window": 40},
        {"window": 40, "keep": 4},
        {"row_format": QuantizedRows(8, 32)},
        {"row_format": QuantizedRows(4, 64), "float_until": 50},
    ]
    mx.random.seed(5)
    for kind in kinds:
        attention, _, rope = make_layer(has_qk_norm=True)
        caches = [KVCache(**kind), KVCache(**kind)]
        for width in [50, 1, 4, 1, 16, *[1] * 34, 3]:
            x = mx.random.normal((1, width, 64))
            meta = ops.StepMeta.uniform(caches[0].offset, batch_size=1, width=width)
            found = []
            for backend, cache in zip(("emulated", "reference"), caches, strict=True):
                prepare_step([cache])
                with ops.use(backend):
                    found.append(ops.attention_block(x, attention, cache, rope, meta))
            mx.eval(*found)
            error = mx.abs(found[0] - found[1]).max().item()
            # A code of a packed row may be another one where its number lies between two.
            assert error < (2e-3 if "row_format" in kind else 2e-4), (kind, width, error)
        assert caches[0].offset == caches[1].offset


def test_single_rows_of_a_batch_meet_on_matrices_and_drafts_do_not() -> None:
    from mlx_edge.cache import KVCache, prepare_step
    from tests.metal.layers import make_layer

    mx.random.seed(6)
    attention, mlp, rope = make_layer()
    caches = [KVCache(), KVCache()]
    for width in (3, 1):
        x = mx.random.normal((5, width, 64))
        meta = ops.StepMeta.uniform(caches[0].offset, batch_size=5, width=width)
        found = []
        for backend, cache in zip(("emulated", "reference"), caches, strict=True):
            prepare_step([cache])
            with ops.use(backend):
                if backend == "emulated":
                    kernel = "qmv_glu" if width > 1 else "qmm_glu"
                    assert kernel in str(ops.choose("mlp_block", x, mlp))
                y = ops.attention_block(x, attention, cache, rope, meta)
                found.append(ops.mlp_block(y, mlp))
        assert mx.abs(found[0] - found[1]).max().item() < 2e-4


def test_a_kernel_that_is_left_out_is_no_error_but_a_refusal_is() -> None:
    from tests.metal.layers import make_linear

    x = mx.zeros((1, 1, 64))
    sevens = ops.Quantized(mx.zeros((8, 14), mx.uint32), mx.ones((8, 2)), mx.ones((8, 2)), 32, 7)
    with ops.use("emulated"):
        assert str(ops.choose("rms_norm", x, ops.Norm(mx.ones((64,)), 1e-5))).endswith("reference")
        assert ops.linear(mx.zeros((1, 40, 64)), make_linear(8, 64)).shape == (1, 40, 8)
        try:
            ops.linear(x, sevens)
        except mlx_edge.errors.HardwareNotSupportedError as error:
            assert "7 bits; served are 2, 3, 4, 5, 6, 8" in str(error)
        else:
            raise AssertionError("7 bits were served")
    assert metal.leave("linear", (x, sevens)) is None
