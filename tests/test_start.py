"""What the way to the first token loads: where the CPU kernels run, no numpy, whose import alone takes as long."""

import subprocess
import sys
from pathlib import Path

import pytest
from mlx import nn

from mlx_edge.models.load import load_model
from mlx_edge.ops import cpu
from mlx_edge.weights.packed import CACHE_VARIABLE
from tests.models.tiny import CONFIGS, make_model, save_model

UNWANTED = {
    "email",
    "huggingface_hub",
    "importlib.metadata",
    "mlx_edge.decoding.constraints",
    "mlx_edge.profiler.report",
    "numpy",
    "zipfile",
}

pytestmark = pytest.mark.skipif(
    cpu.missing() is not None, reason=f"other ops need numpy: no CPU kernels, {cpu.missing()}"
)


def check_start(lines: str, *arguments: str) -> None:
    """Run these lines in a fresh process, and see what it has loaded in the end."""
    program = (
        f"import sys\n{lines}\nsys.exit(', '.join(sorted({UNWANTED!r} & set(sys.modules))) or 0)"
    )
    subprocess.run([sys.executable, "-c", program, *arguments], check=True)


@pytest.mark.parametrize(
    "flags", [[], ["--temp", "1", "--top-p", "0.9", "--top-k", "5"], ["--kv-bits", "8"]]
)
def test_a_command_loads_no_more_than_it_needs(flags: list[str]) -> None:
    command = ["--max-tokens", "2", "--prompt", "Once", *flags]
    check_start(
        "from importlib import import_module\n"
        "assert import_module('mlx_edge.generate').main(sys.argv[1:]) == 0",
        *command,
    )


@pytest.mark.parametrize("name", ["llama3", "yarn"])
@pytest.mark.parametrize("is_quantized", [False, True])
def test_a_model_loads_no_more_than_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_quantized: bool
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "packed"))
    config = CONFIGS[name]
    model = make_model(config)
    if is_quantized:
        nn.quantize(model, group_size=32, bits=4)
        config = {**config, "quantization": {"group_size": 32, "bits": 4}}
    save_model(model, config, tmp_path)
    load_model(tmp_path)  # weights are packed once, under a progress bar: that is no ordinary start
    check_start(
        "from pathlib import Path\n"
        "import mlx.core as mx\n"
        "from mlx_edge.decoding.loop import generate_step\n"
        "from mlx_edge.models.load import load_model\n"
        "steps = generate_step(mx.array([5, 6]), load_model(Path(sys.argv[1])), max_tokens=2)\n"
        "assert len(list(steps)) == 2",
        str(tmp_path),
    )
