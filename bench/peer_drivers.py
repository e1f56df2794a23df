"""OpenVINO GenAI and mlx-lm behind the same lines of JSON as bench/ours.py. Runs in the peers' environment.

    python peer_drivers.py openvino FOLDER THREADS PLAN
    python peer_drivers.py mlx-lm FOLDER THREADS PLAN

A plan is a list of steps as in bench/ours.py; only "prefill" and "decode" are known here.
"""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any, Protocol


class Peer(Protocol):
    """What a plan asks of a peer."""

    def prefill(self, tokens: int) -> float:
        """Tokens per second until the first token after them."""

    def decode(self, tokens: int, depth: int) -> float:
        """Tokens per second of steps after `depth` positions."""


class OpenVINO:
    """openvino_genai's pipeline, with its hints for one request at a time."""

    def __init__(self, model: str, threads: int):
        import openvino_genai as genai  # type: ignore[import-not-found]

        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self.genai = genai
        self.pipe = genai.LLMPipeline(model, "CPU", **options)
        self.vocab_size = len(self.pipe.get_tokenizer().get_vocab())
        self.random = random.Random(0)

    def _run(self, prompt: int, tokens: int) -> list[float]:
        """The time of each new token, in seconds since the call."""
        import numpy as np
        import openvino as ov  # type: ignore[import-not-found]

        ids = np.array([[self.random.randrange(self.vocab_size) for _ in range(prompt)]], np.int64)
        inputs = self.genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        config = self.genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = tokens, True, False
        config.apply_chat_template = False
        times: list[float] = []

        class Watch(self.genai.StreamerBase):  # type: ignore[misc,name-defined]
            def write(self, token: object) -> object:
                times.append(time.perf_counter() - start)
                return genai_status

            def end(self) -> None:
                pass

        genai_status = self.genai.StreamingStatus.RUNNING
        start = time.perf_counter()
        self.pipe.generate(inputs, config, Watch())
        if len(times) != tokens:
            raise RuntimeError(f"{len(times)} tokens came, expected {tokens}")
        return times

    def prefill(self, tokens: int) -> float:
        """Prompt tokens / time to first token."""
        return tokens / self._run(tokens, 1)[0]

    def decode(self, tokens: int, depth: int) -> float:
        """Steps / time from the first to the last token."""
        times = self._run(max(depth, 1), tokens + 1)
        return tokens / (times[-1] - times[0])


class MLXLM:
    """mlx-lm's own loop, on the CPU; the scales and other floats as stored, or as float32, which is faster here."""

    def __init__(self, folder: str, is_float32: bool):
        import mlx.core as mx
        from mlx.utils import tree_map
        from mlx_lm.utils import load_model

        mx.set_default_device(mx.cpu)
        self.model, config = load_model(Path(folder))
        if is_float32:
            self.model.update(tree_map(self._widened, self.model.parameters()))
        mx.eval(self.model.parameters())
        self.vocab_size = int(config["vocab_size"])
        self.random = random.Random(0)

    @staticmethod
    def _widened(array: Any) -> Any:
        import mlx.core as mx

        return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array

    def _run(self, prompt: int, tokens: int) -> list[float]:
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        ids = mx.array([self.random.randrange(self.vocab_size) for _ in range(prompt)])
        start = time.perf_counter()
        steps = generate_step(ids, self.model, max_tokens=tokens)
        return [time.perf_counter() - start for _ in steps]

    def prefill(self, tokens: int) -> float:
        """Prompt tokens / time to first token."""
        return tokens / self._run(tokens, 1)[0]

    def decode(self, tokens: int, depth: int) -> float:
        """Steps / time from the first to the last token."""
        times = self._run(max(depth, 1), tokens + 1)
        return tokens / (times[-1] - times[0])

    def both(self, prompt: int, tokens: int) -> tuple[float, float]:
        """Prefill and decode of one request: all that there is time for."""
        times = self._run(prompt, tokens + 1)
        return prompt / times[0], tokens / (times[-1] - times[0])


def say(facts: dict[str, Any]) -> None:
    """One line of JSON, at once."""
    print(json.dumps(facts), flush=True)


def measure(peer: Peer, step: dict[str, Any]) -> None:
    """One step of the plan."""
    times = range(step.get("times", 1))
    if step["do"] == "prefill":
        peer.prefill(step["tokens"])  # not counted, as in llama-bench
        samples = [peer.prefill(step["tokens"]) for _ in times]
        say({"name": f"prefill_{step['tokens']}", "samples": samples})
    elif step["do"] == "decode":
        samples = [peer.decode(step["tokens"], step["depth"]) for _ in times]
        say({"name": f"decode_{step['depth']}", "samples": samples})
    elif step["do"] == "both" and isinstance(peer, MLXLM):
        prefill, decode = peer.both(step["prompt"], step["tokens"])
        say({"name": f"prefill_{step['prompt']}", "samples": [prefill]})
        say({"name": "decode_0", "samples": [decode]})
    else:
        raise ValueError(f"{step['do']!r} is no measurement here")


def main() -> None:
    """Load, warm up, measure."""
    kind, model, threads, plan = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    start = time.perf_counter()
    peer: Peer
    is_openvino = kind == "openvino"
    peer = OpenVINO(model, threads) if is_openvino else MLXLM(model, is_float32=kind == "mlx-lm")
    say({"name": "load", "s": time.perf_counter() - start})
    if is_openvino:
        peer.decode(1, 0)  # not counted: first use of everything
    for step in json.loads(plan):
        measure(peer, step)


if __name__ == "__main__":
    main()
