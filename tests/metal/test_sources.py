"""Every kernel's text as MLX gets it."""

import pytest

from mlx_edge.ops import metal_launch

FILES = sorted(path.name for path in metal_launch._folder().glob("*.metal"))


@pytest.mark.parametrize("file", FILES)
def test_is_short_enough_to_be_hashed_at_every_call(file: str):
    text = metal_launch.read_source(file)
    assert len(text.encode()) <= metal_launch.SOURCE_BYTES
    assert "//" not in text and "/*" not in text and "\n\n" not in text


@pytest.mark.parametrize("file", FILES)
def test_includes_each_file_once(file: str):
    text = metal_launch.read_source(file)
    assert '#include "' not in text
    for line in set(text.splitlines()):
        if line.startswith("inline ") and line.endswith("{"):
            assert text.splitlines().count(line) == 1, line


@pytest.mark.parametrize("file", FILES)
def test_begins_with_what_it_computes(file: str):
    comment = metal_launch._folder().joinpath(file).read_text().split("\n\n", 1)[0]
    assert comment.startswith("// ") and len(comment) > 40
