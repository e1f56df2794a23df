"""What the package promises: these names and no others, and an import that does no work."""

import subprocess
import sys

import mlx_edge

NAMES = {
    "BlockingEngine",
    "Completion",
    "Engine",
    "EngineClosedError",
    "EngineConfig",
    "GenerationResponse",
    "Grammar",
    "HardwareNotSupportedError",
    "InvalidRequestError",
    "MLXEdgeError",
    "MemoryBudgetError",
    "ModelFormatError",
    "MultimodalGenerator",
    "QueueFullError",
    "Request",
    "Sampling",
    "UnsupportedModelError",
    "__version__",
    "batch_generate",
    "generate",
    "load",
    "make_logits_processors",
    "make_sampler",
    "stream_generate",
}


def test_public_names() -> None:
    assert set(mlx_edge.__all__) == NAMES
    for name in NAMES:
        assert getattr(mlx_edge, name) is not None


def test_a_commands_module_does_not_hide_the_function() -> None:
    import mlx_edge.generate  # noqa: F401
    from mlx_edge import generate

    assert callable(generate)
    assert generate.__module__ == "mlx_edge.decoding.stream"


def test_importing_loads_nothing_heavy() -> None:
    program = (
        "import sys, mlx_edge\n"
        "heavy = {'mlx', 'mlx.core', 'numpy', 'tokenizers', 'sentencepiece', 'jinja2', 'huggingface_hub'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_generating_imports_neither_transformers_nor_torch() -> None:
    program = (
        "import sys\n"
        "from mlx_edge import generate, load\n"
        "generate(*load(), 'Once', max_tokens=2)\n"
        "heavy = {'transformers', 'torch', 'mlx_lm', 'mlx.nn', 'huggingface_hub', 'tqdm'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_metal_sources_are_installed() -> None:
    from importlib.resources import files

    names = [entry.name for entry in files("mlx_edge._metal").iterdir()]
    assert "unpack.metal" in names
