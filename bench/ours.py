"""Our side of bench/peers.py: one process, one model, a list of measurements, a line of JSON for each.

    python -m bench.ours MODEL '[{"do": "prefill", "tokens": 128, "times": 2}, ...]'

Uses the public names of mlx_edge and the loop below them, as a program would; random tokens, greedy, no end token.
What is printed is raw: rates per repetition, seconds, bytes. Knows no peers and makes no ratios.
"""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

TEXTS = Path(__file__).with_name("texts")
BREAK = "\n=== continuation ===\n"  # in a recorded text: what stands before it is the prompt


def status_bytes(field: str) -> int:
    """A line of /proc/self/status, such as VmHWM; 0 where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith(field + ":")]
    return int(found[0]) * 1024 if found else 0


def proportional_bytes() -> int:
    """This process' share of memory: a page that two hold counts half for each. 0 where the system does not say."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


class Bench:
    """A loaded model and what can be measured of it."""

    def __init__(self, folder: str):
        start = time.perf_counter()
        from mlx_edge import load

        imported = time.perf_counter()
        self.model, self.tokenizer = load(folder)
        self.load_s = time.perf_counter() - imported
        self.import_s = imported - start
        self.random = random.Random(0)

    def prompt(self, count: int) -> Any:
        """Random tokens, int32 (count,)."""
        import mlx.core as mx

        highest = self.model.config.vocab_size - 1
        return mx.array([self.random.randint(0, highest) for _ in range(count)], mx.int32)

    def prefill(self, tokens: int) -> float:
        """Tokens per second: all of them / the time until the first token after them is known."""
        from mlx_edge.decoding.loop import generate_step

        prompt = self.prompt(tokens)
        start = time.perf_counter()
        for _ in generate_step(prompt, self.model, max_tokens=1):
            return tokens / (time.perf_counter() - start)
        raise RuntimeError("no token came")

    def decode(self, tokens: int, depth: int) -> float:
        """Tokens per second of `tokens` steps after `depth` stored positions (one at least), one at a time."""
        from mlx_edge.decoding.loop import generate_step

        steps = generate_step(self.prompt(max(depth, 1)), self.model, max_tokens=tokens + 1)
        next(steps)
        start = time.perf_counter()
        for _ in steps:
            pass
        return tokens / (time.perf_counter() - start)

    def batch(self, rows: int, prompt: int, tokens: int) -> dict[str, float]:
        """Tokens per second of all rows together."""
        from mlx_edge import batch_generate

        prompts = [self.prompt(prompt) for _ in range(rows)]
        stats = batch_generate(self.model, self.tokenizer, prompts, tokens).stats
        return {"prefill": stats.prompt_tps, "decode": stats.generation_tps}

    def replay(self, text: str, ngram: bool, limit: int) -> dict[str, float]:
        """A recorded text forced as the model's choice: the seconds of its steps, and how many passes they took."""
        from bench.replay import replay

        prompt, target = split_text(text, self.tokenizer, limit)
        return replay(self.model, self.tokenizer, prompt, target, ngram=ngram)


def split_text(name: str, tokenizer: Any, limit: int) -> tuple[list[int], list[int]]:
    """The tokens of a recorded text's prompt, and of at most `limit` of what follows."""
    before, after = (TEXTS / f"{name}.txt").read_text().split(BREAK)
    prompt = tokenizer.encode(before + "\n")
    return prompt, tokenizer.encode(after, add_special_tokens=False)[:limit]


def measure(bench: Bench, step: dict[str, Any]) -> dict[str, Any]:
    """One step of the plan: its name and what was found."""
    do = step["do"]
    times = range(step.get("times", 1))
    if do == "prefill":
        name = f"prefill_{step['tokens']}"
        bench.prefill(step["tokens"])  # not counted, as in llama-bench
        return {"name": name, "samples": [bench.prefill(step["tokens"]) for _ in times]}
    if do == "decode":
        name, wanted = f"decode_{step['depth']}", (step["tokens"], step["depth"])
        return {"name": name, "samples": [bench.decode(*wanted) for _ in times]}
    if do == "batch":
        found = bench.batch(step["rows"], step["prompt"], step["tokens"])
        return {"name": f"batch_{step['rows']}", **found}
    if do == "replay":
        found = bench.replay(step["text"], step["ngram"], step["limit"])
        kind = "ngram" if step["ngram"] else "plain"
        return {"name": f"replay_{step['text']}_{kind}", **found}
    raise ValueError(f"{do!r} is no measurement")


def say(facts: dict[str, Any]) -> None:
    """One line of JSON, at once: a run that is ended early keeps its lines."""
    print(json.dumps(facts), flush=True)


def hold(bench: Bench) -> None:
    """One token; then, whenever a line comes, this process' share of memory, until there are no more."""
    bench.prefill(16)
    say({"name": "ready"})
    for _ in sys.stdin:
        say({"name": "share", "bytes": proportional_bytes(), "rss": status_bytes("VmRSS")})


def main() -> None:
    """Load, warm up, measure."""
    bench = Bench(sys.argv[1])
    say({"name": "load", "s": bench.load_s, "import_s": bench.import_s})
    if sys.argv[2] == "hold":
        hold(bench)
        return
    plan = json.loads(sys.argv[2])
    bench.decode(1, 0)  # not counted: first use of everything
    for step in plan:
        say(measure(bench, step) | {"peak_bytes": status_bytes("VmHWM")})


if __name__ == "__main__":
    main()
