"""Log-probabilities as users read them: the chosen token's, the likeliest beside it, and what each token says."""

import mlx.core as mx
import numpy as np

from mlx_edge.engine.request import TokenLogprob
from mlx_edge.text import Tokenizer


class TokenTexts:
    """What each token says by itself within a text, looked up once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}
        self._opening = next(
            index for index in range(tokenizer.vocab_size) if tokenizer.new_reader().read(index)
        )

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token after others; none for an id that no token has."""
        if token not in self._known:
            reader = self._tokenizer.new_reader()
            reader.read(
                self._opening
            )  # the start of a text takes a space away in some vocabularies
            self._known[token] = reader.read(token)
        return self._known[token]

    def read(self, token: int, row: mx.array, num_top: int) -> TokenLogprob:
        """The record of a token chosen by these log-probabilities (V,), with the `num_top` likeliest."""
        values = np.array(row.astype(mx.float32))
        likeliest: list[int] = []
        if num_top:
            count = min(num_top, values.size)
            candidates = np.argpartition(-values, count - 1)[:count]
            likeliest = sorted(candidates.tolist(), key=lambda i: (-values[i], i))
        top = tuple(self._record(i, values) for i in likeliest if np.isfinite(values[i]))
        return self._record(token, values, top)

    def _record(
        self, token: int, values: np.ndarray, top: tuple[TokenLogprob, ...] = ()
    ) -> TokenLogprob:
        data = self.bytes_of(token)
        text = data.decode("utf-8", "replace")
        return TokenLogprob(token, text, data, float(values[token]), top)
