"""Random-weight models of real shapes, the same shape in each peer's own format.

Speed does not depend on what the weights are, so they are made here and nothing is downloaded. The tokenizer is a true
byte-level BPE, trained on the Python standard library, so that a text has as many tokens, and repeats itself as often,
as with the real one of that size. Knows nothing of how the models are run.
"""

import json
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.peer_setup import StepFailed, Word, Workplace

BITS, GROUP_SIZE = 4, 64
QUANTIZATIONS = ("Q4_0", "Q4_K_M")
IR_KINDS = ("gguf", "int4")
CONTEXT = 8192
# The split of Llama 3's published tokenizer.json: words with their space, up to three digits, punctuation.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>")


@dataclass(frozen=True)
class Shape:
    """What decides a model's speed. All have tied embeddings."""

    name: str
    key: str  # in the names of the summary
    model_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float

    def linears(self) -> dict[str, tuple[int, int]]:
        """The (out, in) shape of each matrix of a layer, by the name that Hugging Face gives it."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (q, self.hidden_size),
            "self_attn.k_proj": (kv, self.hidden_size),
            "self_attn.v_proj": (kv, self.hidden_size),
            "self_attn.o_proj": (self.hidden_size, q),
            "mlp.gate_proj": (self.intermediate_size, self.hidden_size),
            "mlp.up_proj": (self.intermediate_size, self.hidden_size),
            "mlp.down_proj": (self.hidden_size, self.intermediate_size),
        }

    def norms(self) -> dict[str, int]:
        """The length of each norm of a layer, by the name that Hugging Face gives it."""
        names = {"input_layernorm": self.hidden_size, "post_attention_layernorm": self.hidden_size}
        if self.model_type == "qwen3":
            names |= {"self_attn.q_norm": self.head_dim, "self_attn.k_norm": self.head_dim}
        return names

    def cache_bytes(self, positions: int) -> int:
        """Keys and values in 16 bits."""
        return 2 * 2 * self.num_layers * self.num_kv_heads * self.head_dim * positions


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-3.2-1b", "1b", "llama", 2048, 16, 32, 8, 64, 8192, 128256, 5e5),
        Shape("qwen3-0.6b", "06b", "qwen3", 1024, 28, 16, 8, 128, 3072, 151936, 1e6),
        Shape("smollm3-3b", "3b", "smollm3", 2048, 36, 16, 4, 128, 11008, 128256, 5e6),
        Shape("tiny", "tiny", "llama", 256, 2, 4, 2, 64, 768, 4096, 1e5),
    )
}


def make_tokenizer(shape: Shape, path: Path) -> None:
    """Train a byte-level BPE on the standard library's sources; made-up merges fill it up to the true size."""
    import tokenizers as t

    library = Path(sysconfig.get_path("stdlib"))
    sources = sorted(p for p in library.rglob("*.py") if "site-packages" not in p.parts)
    tokenizer = t.Tokenizer(t.models.BPE())
    tokenizer.pre_tokenizer = t.pre_tokenizers.Sequence(
        [
            t.pre_tokenizers.Split(t.Regex(PIECES), "isolated"),
            t.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = t.decoders.ByteLevel()
    trainer = t.trainers.BpeTrainer(
        vocab_size=shape.vocab_size - len(SPECIAL),
        min_frequency=2,
        initial_alphabet=sorted(t.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(sources), trainer)
    model = json.loads(tokenizer.to_str())
    _fill(model["model"], shape.vocab_size - len(SPECIAL))
    tokenizer = t.Tokenizer.from_str(json.dumps(model))
    tokenizer.add_special_tokens([t.AddedToken(name, special=True) for name in SPECIAL])
    tokenizer.save(str(path), pretty=False)


def _texts(sources: list[Path]) -> Iterator[str]:
    for path in sources:
        yield path.read_text(errors="replace")


def _fill(model: dict[str, Any], size: int) -> None:
    """Merges of two long tokens, which no text holds, until the vocabulary has `size` tokens."""
    vocabulary, merges = model["vocab"], model["merges"]
    longest = sorted(vocabulary, key=len, reverse=True)[:2000]
    pairs = ((left, right) for left in longest for right in longest)
    while len(vocabulary) < size:
        left, right = next(pairs)
        if left + right not in vocabulary:
            vocabulary[left + right] = len(vocabulary)
            merges.append([left, right])


def config_json(shape: Shape) -> dict[str, Any]:
    """The `config.json` of a 4-bit checkpoint of this shape."""
    architectures = {"llama": "Llama", "qwen3": "Qwen3", "smollm3": "SmolLM3"}
    quantization = {"group_size": GROUP_SIZE, "bits": BITS}
    config: dict[str, Any] = {
        "architectures": [f"{architectures[shape.model_type]}ForCausalLM"],
        "model_type": shape.model_type,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "rms_norm_eps": 1e-5,
        "vocab_size": shape.vocab_size,
        "rope_theta": shape.rope_theta,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": shape.vocab_size - 2,
        "eos_token_id": shape.vocab_size - 1,
        "torch_dtype": "bfloat16",
        "quantization": quantization,
        "quantization_config": quantization,
    }
    if shape.model_type == "smollm3":
        config["no_rope_layer_interval"] = 4
        config["no_rope_layers"] = [int((i + 1) % 4 != 0) for i in range(shape.num_layers)]
    return config


def make_mlx(shape: Shape, folder: Path) -> None:
    """A folder as mlx-community ships it: 4 bits, groups of 64, bfloat16 scales, the embedding packed too."""
    import mlx.core as mx

    rng = np.random.default_rng(0)
    arrays: dict[str, mx.array] = {}

    def add_linear(name: str, rows: int, columns: int) -> None:
        packs = rng.integers(0, 2**32, (rows, columns * BITS // 32), dtype=np.uint32)
        scales = (rng.random((rows, columns // GROUP_SIZE), np.float32) + 0.5) * 0.3
        scales /= np.sqrt(columns)
        arrays[f"{name}.weight"] = mx.array(packs)
        arrays[f"{name}.scales"] = mx.array(scales).astype(mx.bfloat16)
        arrays[f"{name}.biases"] = mx.array(-7.5 * scales).astype(mx.bfloat16)

    add_linear("model.embed_tokens", shape.vocab_size, shape.hidden_size)
    for index in range(shape.num_layers):
        for name, (rows, columns) in shape.linears().items():
            add_linear(f"model.layers.{index}.{name}", rows, columns)
        for name, length in shape.norms().items():
            arrays[f"model.layers.{index}.{name}.weight"] = mx.ones((length,), mx.bfloat16)
    arrays["model.norm.weight"] = mx.ones((shape.hidden_size,), mx.bfloat16)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config_json(shape), indent=1))
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "add_bos_token": True}
    # transformers, which mlx-lm loads tokenizers with, wants a class.
    names["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


@dataclass(frozen=True)
class Models:
    """Where the models of one shape are."""

    root: Path
    shape: Shape

    @property
    def mlx(self) -> Path:
        """The folder that mlx_edge and mlx-lm read."""
        return self.root / self.shape.name

    def weight_bytes(self) -> int:
        """The bytes of the tensors of the MLX checkpoint; with tied embeddings a token's step reads all of them."""
        path = self.mlx / "model.safetensors"
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        return path.stat().st_size - 8 - header

    def ir(self, kind: str) -> Path:
        """The folder that OpenVINO reads: "gguf", as its reader made it, or "int4", as its exporter packs."""
        return self.root / f"{self.shape.name}-openvino-{kind}"

    def gguf(self, quantization: str) -> Path:
        """The file that llama.cpp reads."""
        return self.root / f"{self.shape.name}-{quantization}.gguf"


def make_models(models: Models, place: Workplace, say: Callable[[str], None]) -> None:
    """Make what is missing. Each file gets its name when it is whole, so that a killed run goes on.

    What cannot be made is kept in `place.failures` as "GGUF NAME" or "IR NAME", and costs its readers only.
    """
    shape, folder = models.shape, models.mlx
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.exists():
        say(f"{shape.name}: training a tokenizer of {shape.vocab_size} tokens")
        part = tokenizer.with_suffix(".part")
        make_tokenizer(shape, part)
        part.rename(tokenizer)
    done = folder / "made"
    if not done.exists():
        say(f"{shape.name}: making MLX's 4-bit checkpoint")
        make_mlx(shape, folder)
        done.touch()
    kind = "GGUF"
    try:
        _make_gguf(models, place, say)
        kind = "IR"
        _make_ir(models, place, say)
    except (StepFailed, OSError) as failure:
        say(f"{shape.name}: no {kind}: {failure}")
        place.failures[f"{kind} {shape.name}"] = str(failure)


def _make_gguf(models: Models, place: Workplace, say: Callable[[str], None]) -> None:
    """By llama-quantize, from float16."""
    shape = models.shape
    missing = [name for name in QUANTIZATIONS if not models.gguf(name).exists()]
    if not missing:
        return
    if reason := place.failures.get("llama.cpp") or place.failures.get("pip gguf"):
        raise StepFailed(reason)
    floats = models.gguf("F16")
    if not floats.exists():
        say(f"{shape.name}: making a float16 GGUF")
        described = json.dumps({**asdict(shape), "context": CONTEXT})
        part = models.gguf("F16.part")
        script = Path(__file__).with_name("peer_gguf.py")
        words: list[Word] = [place.python, script, described, models.mlx / "tokenizer.json", part]
        place.run("gguf", words)
        part.rename(floats)
    for name in missing:
        say(f"{shape.name}: llama-quantize {name}")
        part = models.gguf(f"{name}.part")
        place.run("quantize", [place.tool("llama-quantize"), floats, part, name, "2"])
        part.rename(models.gguf(name))
    floats.unlink()


def _make_ir(models: Models, place: Workplace, say: Callable[[str], None]) -> None:
    """By OpenVINO itself, from the GGUF."""
    if models.ir("int4").exists():
        return
    if reason := place.failures.get("pip openvino"):
        raise StepFailed(reason)
    say(f"{models.shape.name}: making OpenVINO's files")
    script = Path(__file__).with_name("peer_ir.py")
    part = models.ir("part")
    shutil.rmtree(part, ignore_errors=True)
    place.run("ir", [place.python, script, models.gguf("Q4_0"), part])
    for kind in IR_KINDS:  # int4, by which we know, comes last
        (part / kind).rename(models.ir(kind))
    part.rmdir()
