"""What `python -m mlx_edge.plan` says of a model that sees, beside what a process comes to hold that reads an image.

    python -m bench.vision_memory --json OUT [--work FOLDER] [--only NAME]

The folders are made here, with random packed weights in the shape of AutoGLM-Phone-9B (GLM-4.1V-9B): all of it for an
image of 224 x 224 pixels, which takes minutes on two cores, and two layers of each part for a whole screenshot, where
the tower's activations are what counts. Measured as `bench/memory_plan.py` measures; what was made is deleted.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.memory_plan import measure, predict

BITS, GROUP = 4, 64
LIMIT_S = 1800.0
NEW_TOKENS = 8
TEXT_TOKENS = 16
IMAGE_TOKEN = 9
PLAN = [sys.executable, "-m", "mlx_edge.plan"]


@dataclass(frozen=True)
class Cell:
    """A model of GLM-4.1V's shape with so many layers, and an image."""

    name: str
    layers: int
    blocks: int
    vocabulary: int
    height: int
    width: int


CELLS = (
    Cell("two-layers-small", 2, 2, 16384, 224, 224),
    Cell("two-layers-screenshot", 2, 2, 16384, 2400, 1080),
    Cell("autoglm-9b", 40, 24, 151552, 224, 224),
)


def make_config(cell: Cell) -> dict[str, Any]:
    """As the hub's config.json."""
    text = {
        "model_type": "glm4v_text",
        "hidden_size": 4096,
        "intermediate_size": 13696,
        "num_hidden_layers": cell.layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "max_position_embeddings": 65536,
        "rms_norm_eps": 1e-5,
        "vocab_size": cell.vocabulary,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [8, 12, 12],
        },
    }
    vision = {
        "model_type": "glm4v_vision",
        "depth": cell.blocks,
        "hidden_size": 1536,
        "num_heads": 12,
        "intermediate_size": 13696,
        "out_hidden_size": 4096,
        "image_size": 336,
        "patch_size": 14,
    }
    return {
        "model_type": "glm4v",
        "image_token_id": IMAGE_TOKEN,
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": vision,
        "quantization": {"bits": BITS, "group_size": GROUP},
    }


def matrices(cell: Cell) -> Iterator[dict[str, tuple[int, int]]]:
    """Rows and columns of what is packed, a file's worth at a time."""
    language, visual, size = "model.language_model.", "model.visual.", 1536
    table = (cell.vocabulary, 4096)
    yield {f"{language}embed_tokens": table, "lm_head": table}
    for i in range(cell.layers):
        layer = f"{language}layers.{i}."
        yield {
            f"{layer}self_attn.q_proj": (4096, 4096),
            f"{layer}self_attn.k_proj": (256, 4096),
            f"{layer}self_attn.v_proj": (256, 4096),
            f"{layer}self_attn.o_proj": (4096, 4096),
            f"{layer}mlp.gate_up_proj": (2 * 13696, 4096),
            f"{layer}mlp.down_proj": (4096, 13696),
        }
    for i in range(cell.blocks):
        block = f"{visual}blocks.{i}."
        yield {
            f"{block}attn.qkv": (3 * size, size),
            f"{block}attn.proj": (size, size),
            f"{block}mlp.gate_proj": (4096, size),
            f"{block}mlp.up_proj": (4096, size),
            f"{block}mlp.down_proj": (size, 4096),
        }
    yield {
        f"{visual}merger.proj": (4096, 4096),
        f"{visual}merger.gate_proj": (13696, 4096),
        f"{visual}merger.up_proj": (13696, 4096),
        f"{visual}merger.down_proj": (4096, 13696),
    }


def floats(cell: Cell) -> dict[str, tuple[int, ...]]:
    """Shapes of what is not packed."""
    language, visual, size = "model.language_model.", "model.visual.", 1536
    shapes: dict[str, tuple[int, ...]] = {
        f"{language}norm.weight": (4096,),
        f"{visual}patch_embed.proj.weight": (size, 3, 2, 14, 14),
        f"{visual}patch_embed.proj.bias": (size,),
        f"{visual}embeddings.position_embedding.weight": (576, size),
        f"{visual}post_conv_layernorm.weight": (size,),
        f"{visual}post_layernorm.weight": (size,),
        f"{visual}downsample.weight": (4096, size, 2, 2),
        f"{visual}downsample.bias": (4096,),
        f"{visual}merger.post_projection_norm.weight": (4096,),
        f"{visual}merger.post_projection_norm.bias": (4096,),
    }
    norms = ("input", "post_attention", "post_self_attn", "post_mlp")
    for i in range(cell.layers):
        layer = f"{language}layers.{i}."
        shapes |= {f"{layer}{norm}_layernorm.weight": (4096,) for norm in norms}
        rows = {"q": 4096, "k": 256, "v": 256}
        shapes |= {f"{layer}self_attn.{n}_proj.bias": (count,) for n, count in rows.items()}
    for i in range(cell.blocks):
        shapes |= {f"{visual}blocks.{i}.norm{n}.weight": (size,) for n in (1, 2)}
    return shapes


def make_folder(cell: Cell, folder: Path) -> None:
    """Write it, one file per layer; all have the same random codes."""
    import mlx.core as mx
    import numpy as np

    from bench.peer_models import Shape, make_tokenizer
    from mlx_edge.weights import write_safetensors

    folder.mkdir(parents=True)
    drawn = np.random.default_rng(0).integers(0, 1 << 32, 1 << 24, np.uint32)
    files: dict[str, str] = {}

    def write(number: int, tensors: dict[str, mx.array]) -> None:
        name = f"model-{number:05}.safetensors"
        write_safetensors(folder / name, tensors)
        files.update(dict.fromkeys(tensors, name))

    for number, part in enumerate(matrices(cell), start=1):
        tensors = {}
        for name, (rows, columns) in part.items():
            groups = (rows, columns // GROUP)
            words = np.resize(drawn, rows * columns * BITS // 32).reshape(rows, -1)
            tensors[f"{name}.weight"] = mx.array(words)
            tensors[f"{name}.scales"] = mx.full(groups, 0.004, mx.bfloat16)
            tensors[f"{name}.biases"] = mx.full(groups, -0.03, mx.bfloat16)
        write(number, tensors)
    rest = {name: mx.full(shape, 0.01, mx.bfloat16) for name, shape in floats(cell).items()}
    write(0, rest)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(make_config(cell)))
    processor = {"image_processor_type": "Glm4vImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    # A larger one takes minutes to train, and is as large in both figures.
    shape = Shape("autoglm", "autoglm", "llama", 4096, 2, 32, 2, 128, 13696, 16384, 10000.0)
    make_tokenizer(shape, folder / "tokenizer.json")


def serve(folder: str, cell: Cell) -> None:
    """The child: an engine that answers one request with the image. Prints its own reading."""
    from mlx_edge.engine.blocking import BlockingEngine
    from mlx_edge.engine.config import EngineConfig
    from mlx_edge.engine.request import Request
    from mlx_edge.profiler.memory import read_status

    config = EngineConfig(
        max_batch_size=1,
        prefix_cache_bytes=0,
        image_cache_bytes=0,
        max_pixels=cell.height * cell.width,
    )
    tokens = (*range(10, 10 + TEXT_TOKENS), IMAGE_TOKEN, *range(10, 10 + TEXT_TOKENS))
    with BlockingEngine(folder, config) as engine:
        started = read_status()
        request = Request(tokens, NEW_TOKENS, images=(draw_image(cell),), ignore_eos=True)
        answer = engine.generate(request)
        assert len(answer.tokens) == NEW_TOKENS
        found, stats = read_status(), engine.stats()
    files = found["RssFile"] + found["RssShmem"]
    told = {
        "high_water": found["VmHWM"] - files,
        "files": files,
        "started": started["RssAnon"],
        "prompt_tokens": answer.usage.prompt_tokens,
        "image_s": stats.image_s,
        "first_token_s": answer.usage.first_token_s,
    }
    print(json.dumps(told))


def draw_image(cell: Cell) -> bytes:
    """A PNG."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((cell.width, cell.height)).save(buffer, "PNG")
    return buffer.getvalue()


def run_cell(cell: Cell, work: Path) -> dict[str, Any]:
    """Make the folder, predict, measure, delete; sizes in bytes."""
    folder = work / cell.name
    make_folder(cell, folder)
    try:
        # The first process packs the weights for this CPU; plan speaks of those that come after it.
        load = f"from mlx_edge import load; load({str(folder)!r})"
        subprocess.run([sys.executable, "-c", load], check=True)
        words = ("--serve", str(folder), cell.name)
        measured = measure("bench.vision_memory", *words, limit_s=LIMIT_S)
        context = measured["prompt_tokens"] + NEW_TOKENS
        flags = ("--context", context, "--images", 1, "--max-pixels", cell.height * cell.width)
        planned = predict(str(folder), list(map(str, flags)))
    finally:
        shutil.rmtree(folder)
    peak = max(measured["sampled"], measured["high_water"])
    return {
        "cell": cell.name,
        "predicted": planned["peak_bytes"],
        "measured": peak,
        "error": planned["peak_bytes"] / peak - 1,
        "total_predicted": planned["total_bytes"],
        **measured,
        "plan": planned,
    }


def main() -> None:
    """All cells, or one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "vision_memory")
    parser.add_argument("--only", choices=[cell.name for cell in CELLS])
    parser.add_argument("--serve", nargs=2, metavar=("FOLDER", "NAME"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve[0], next(cell for cell in CELLS if cell.name == args.serve[1]))
        return
    os.environ["MLX_EDGE_CACHE"] = str(args.work / "packed")
    rows = []
    try:
        for cell in CELLS:
            if args.only in (None, cell.name):
                rows.append(run_cell(cell, args.work))
                told = rows[-1]
                print(
                    f"{cell.name}: plan {told['predicted'] / 1e9:.3f} GB, measured {told['measured'] / 1e9:.3f} GB "
                    f"({told['error']:+.1%}), with mapped weights {told['total_predicted'] / 1e9:.2f} GB"
                )
    finally:
        shutil.rmtree(args.work, ignore_errors=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
