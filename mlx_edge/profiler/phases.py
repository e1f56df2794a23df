"""The phases of a generation, observed from outside: prefill, decode, sample, tokenise, detokenise.

Wraps what goes into a generation (tokenizer, sampler) and what comes out (an iterator of responses); the loop
between them is not touched. Knows that the sampler is called first when the prompt has been read, and nothing else
of the loop. Loading and tokenising beforehand are spans that the caller opens: `with profiler.phase("load")`.

MLX computes later than Python asks, and the loop has one step in flight. Where a phase ends is therefore only true
when what it computed is awaited there: by default the sampler's input and output are evaluated. That takes the
overlap of two steps away; `compare` says what it costs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import mlx.core as mx

from mlx_edge.profiler.timer import Profiler, Span

T = TypeVar("T")
Sampler = Callable[[mx.array], mx.array]

# What of a tokenizer is timed, and as which phase; what makes another timed object names its table.
DETOKENIZER: Mapping[str, str] = dict.fromkeys(
    ("add_token", "finalize", "last_segment", "text"), "detokenise"
)
TOKENIZER: Mapping[str, str] = {
    **dict.fromkeys(("encode", "apply_chat_template"), "tokenise"),
    **dict.fromkeys(("decode", "detokenizer", "new_detokenizer"), "detokenise"),
}
_TIMED_RESULTS: Mapping[str, Mapping[str, str]] = {"detokenizer": DETOKENIZER}


@dataclass(frozen=True)
class ObservationCost:
    """The same generation once observed and once not; seconds inside the generation, steps as yielded."""

    observed_s: float
    plain_s: float
    num_steps: int
    num_plain_steps: int

    @property
    def ratio(self) -> float:
        """Observed over plain; 0 when nothing ran. Means nothing when the steps differ."""
        return self.observed_s / self.plain_s if self.plain_s else 0.0


class Phases:
    """Observes one generation after another in one thread."""

    def __init__(self, profiler: Profiler, *, evaluates: bool = True) -> None:
        """With `evaluates` off nothing is awaited: "sample" is then the time to ask for it, not to compute it, and
        the prefill ends with the first response."""
        self._profiler = profiler
        self._evaluates = evaluates
        self._span: Span | None = None  # the step that is running
        self._in_prefill = False
        self._observed_ns = 0
        self._num_steps = 0

    def tokenizer(self, tokenizer: T) -> T:
        """A stand-in for the tokenizer whose work is timed."""
        if not self._profiler.is_on:
            return tokenizer
        return cast(T, Timed(tokenizer, self._profiler, TOKENIZER))

    def sampler(self, sampler: Sampler) -> Sampler:
        """A stand-in for the sampler; its first call in a generation ends the prefill."""
        if not self._profiler.is_on:
            return sampler

        def sample(logprobs: mx.array) -> mx.array:
            if self._evaluates:
                mx.eval(logprobs)
                self._end_prefill()
            with self._profiler.phase("sample"):
                tokens = sampler(logprobs)
                if self._evaluates:
                    mx.eval(tokens)
            return tokens

        return sample

    def steps(self, responses: Iterable[T]) -> Iterator[T]:
        """The responses, with the time to make each in the phase prefill or decode; the consumer's is in neither."""
        if not self._profiler.is_on:
            yield from responses
            return
        iterator = iter(responses)
        self._in_prefill, self._observed_ns, self._num_steps = True, 0, 0
        try:
            while True:
                start = self._profiler.clock()
                try:
                    response = self._next(iterator)
                except StopIteration:
                    return
                finally:
                    self._observed_ns += self._profiler.clock() - start
                self._num_steps += 1
                self._in_prefill = False
                yield response
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()

    def compare(self, plain: Iterable[object]) -> ObservationCost:
        """Run the same generation unobserved, to its end, and say what observing the last one cost."""
        clock = self._profiler.clock
        start = clock()
        num_plain_steps = sum(1 for _ in plain)
        plain_s = (clock() - start) / 1e9
        return ObservationCost(self._observed_ns / 1e9, plain_s, self._num_steps, num_plain_steps)

    def _next(self, iterator: Iterator[T]) -> T:
        self._enter("prefill" if self._in_prefill else "decode")
        failure: BaseException | None = None
        try:
            return next(iterator)
        except StopIteration:
            raise
        except BaseException as error:
            failure = error
            raise
        finally:
            self._leave(failure)

    def _end_prefill(self) -> None:
        is_ours = self._span is not None and self._profiler.current_phase() == "prefill"
        if self._in_prefill and is_ours:
            self._in_prefill = False
            self._leave()
            self._enter("decode")

    def _enter(self, name: str) -> None:
        self._span = self._profiler.phase(name)
        self._span.__enter__()

    def _leave(self, failure: BaseException | None = None) -> None:
        assert self._span is not None
        span, self._span = self._span, None
        span.__exit__(None if failure is None else type(failure), failure, None)


class Timed:
    """A stand-in that times the named methods and properties of an object; all others pass through."""

    __slots__ = ("_object", "_phases", "_profiler")  # so that setting anything on it fails

    def __init__(self, object_: object, profiler: Profiler, phases: Mapping[str, str]) -> None:
        """`phases` maps a method's or property's name to the phase that its time belongs to."""
        self._object = object_
        self._profiler = profiler
        self._phases = phases

    def __getattr__(self, name: str) -> Any:
        phase = self._phases.get(name)
        if phase is None:
            return getattr(self._object, name)
        with self._profiler.phase(phase):
            value = getattr(self._object, name)
        if name in _TIMED_RESULTS:
            return Timed(value, self._profiler, _TIMED_RESULTS[name])
        return self._profiler.wrap(phase, value, kind="phase") if callable(value) else value
