"""OpenVINO's own files of a model: as its GGUF reader makes them, and packed as its exporter packs.

    python peer_ir.py MODEL-Q4_0.gguf FOLDER

Runs in the peers' environment. FOLDER/gguf gets what the reader makes (groups of 32, the head in groups of 16), so that
a measurement need not read the GGUF again; FOLDER/int4 the same graph, its weights as `optimum-cli export openvino`
packs them by default: 4 bits in groups of 128, embedding and head in 8 bits with a scale a row. Values are random.
"""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov  # type: ignore[import-not-found]
import openvino_genai as genai  # type: ignore[import-not-found]
from openvino import opset13 as op

GROUP_SIZE = 128


def save_as_read(model: Path, folder: Path) -> None:
    """The reader's own graph, saved by it beside the file that it reads."""
    with tempfile.TemporaryDirectory() as place:
        link = Path(place) / model.name
        link.symlink_to(model.resolve())
        genai.LLMPipeline(str(link), "CPU", enable_save_ov_model=True)
        folder.mkdir(parents=True, exist_ok=True)
        for file in Path(place).glob("openvino_*"):
            shutil.move(file, folder / file.name)


def packed_weights(graph: Any) -> Iterator[tuple[Any, Any]]:
    """Each (Reshape, Constant) of a chain Constant -> Convert -> Subtract -> Multiply -> Reshape of packed weights."""
    for node in graph.get_ops():
        if node.get_type_name() != "Reshape":
            continue
        path = []
        source = node
        for _ in range(4):
            if not source.get_input_size():
                break
            source = source.input_value(0).get_node()
            path.append(source.get_type_name())
        if path == ["Multiply", "Subtract", "Convert", "Constant"]:
            yield node, source


def random_weights(rng: np.random.Generator, rows: int, columns: int, is_head: bool) -> Any:
    """The node of a (rows, columns) float16 matrix, packed as the exporter does."""
    shape = [rows, columns] if is_head else [rows, columns // GROUP_SIZE, GROUP_SIZE]
    scales = [*shape[:-1], 1]
    bits = 8 if is_head else 4
    packed = rng.integers(0, 256, rows * columns * bits // 8, dtype=np.uint8)
    middle = 0x80 if is_head else 0x88  # of one value, of two
    zeros = np.full((int(np.prod(scales)) * bits + 7) // 8, middle, np.uint8)
    scale = np.full(scales, 4 / 2**bits / np.sqrt(columns), np.float16)
    centred = op.subtract(_as_float(packed, shape, bits), _as_float(zeros, scales, bits))
    product = op.multiply(centred, op.constant(scale))
    if is_head:
        return product
    return op.reshape(product, op.constant(np.array([rows, columns], np.int64)), False)


def _as_float(packed: Any, shape: list[int], bits: int) -> Any:
    kind = ov.Type.u8 if bits == 8 else ov.Type.u4
    tensor = ov.Tensor(kind, ov.Shape(shape))  # memory of its own: a constant does not keep numpy's
    tensor.data[...] = packed.reshape(tensor.data.shape)
    return op.convert(op.constant(tensor), ov.Type.f16)


def save_as_exported(source: Path, folder: Path) -> None:
    """The reader's graph with the exporter's packing."""
    graph = ov.Core().read_model(source / "openvino_model.xml")
    rng = np.random.default_rng(0)
    made: dict[str, Any] = {}  # the embedding is also the head: one constant for both
    for reshape, constant in list(packed_weights(graph)):
        rows, groups, width = constant.get_output_shape(0)
        name = constant.get_friendly_name()
        if groups * width % GROUP_SIZE:
            continue
        is_head = constant.get_element_type() == ov.Type.u8
        if name not in made:
            made[name] = random_weights(rng, rows, groups * width, is_head)
        target = made[name].output(0)
        for reader in list(reshape.output(0).get_target_inputs()):
            reader.replace_source_output(target)
    graph.validate_nodes_and_infer_types()
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.glob("openvino_*tokenizer.*"):
        shutil.copy(file, folder / file.name)
    ov.save_model(graph, folder / "openvino_model.xml", compress_to_fp16=False)


def main() -> None:
    """Make both."""
    model, folder = Path(sys.argv[1]), Path(sys.argv[2])
    save_as_read(model, folder / "gguf")
    save_as_exported(folder / "gguf", folder / "int4")


if __name__ == "__main__":
    main()
