"""One process whose memory is measured: an engine that answers `batch` requests of `context` tokens each at once.

    python -m bench.memory_cell '[FOLDER, {"model": ..., "context": ..., "batch": ...}]'

Imports little, since all that it holds counts. `bench/memory_plan.py` starts it and says what is made of it.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass

MORE_TOKENS = 8  # that all sequences generate together


@dataclass(frozen=True)
class Cell:
    """One process to predict and to measure."""

    model: str
    context: int
    batch: int
    kv_bits: int | None = None
    chunk: int = 512
    max_kv_size: int | None = None

    def flags(self) -> list[str]:
        """As plan takes them."""
        flags = ["--context", self.context, "--batch", self.batch, "--prefill-chunk", self.chunk]
        if self.kv_bits:
            flags += ["--kv-bits", self.kv_bits]
        if self.max_kv_size:
            flags += ["--max-kv-size", self.max_kv_size]
        return [str(flag) for flag in flags]


def count_new_tokens(cell: Cell) -> int:
    """So many that the first sequence still generates when the last prompt has been read: all are held at once."""
    steps = cell.batch * -(-cell.context // cell.chunk)
    return min(steps + MORE_TOKENS, cell.context // 2)


def serve(folder: str, cell: Cell) -> None:
    """The child: an engine with `batch` requests at once, each until its context is full. Prints its own reading."""
    from mlx_edge.engine.blocking import BlockingEngine
    from mlx_edge.engine.config import EngineConfig
    from mlx_edge.engine.request import Request
    from mlx_edge.profiler.memory import read_status

    config = EngineConfig(
        max_batch_size=cell.batch,
        prefill_chunk=cell.chunk,
        kv_bits=cell.kv_bits,
        max_kv_size=cell.max_kv_size,
        prefix_cache_bytes=0,
        added_latency_ms=1e6,  # chunks of the full size: what a plan must count on
    )
    with BlockingEngine(folder, config) as engine:
        vocabulary = engine.engine.vocab_size
        new_tokens = count_new_tokens(cell)
        length = cell.context - new_tokens
        waiting = [
            engine.enqueue(Request(prompt, max_tokens=new_tokens, ignore_eos=True))
            for prompt in make_prompts(cell.batch, length, vocabulary)
        ]
        for answer in waiting:
            assert len(answer.result().tokens) == new_tokens
        found = read_status()  # while the weights are mapped: their pages are what is taken off
    files = found["RssFile"] + found["RssShmem"]
    print(json.dumps({"high_water": found["VmHWM"] - files, "files": files}))


def make_prompts(count: int, length: int, vocabulary: int) -> Iterator[tuple[int, ...]]:
    """Prompts of which no two begin alike, so that none is found in a cache."""
    for row in range(count):
        yield tuple((7919 * (i + 1) + 104729 * row) % (vocabulary - 8) + 4 for i in range(length))


if __name__ == "__main__":
    name, fields = json.loads(sys.argv[1])
    serve(name, Cell(**fields))
