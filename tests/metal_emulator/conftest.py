"""The emulator needs a compiler: without one its tests are skipped, and say so."""

import pytest

from metal_emulator import MetalError
from metal_emulator.compiler import find_compiler, runtime_command

WITHOUT_COMPILER = {"test_source.py"}


@pytest.fixture(autouse=True)
def compilers(request: pytest.FixtureRequest) -> None:
    """Skip in words when neither a clang nor ziglang is there."""
    if request.node.path.name in WITHOUT_COMPILER:
        return
    try:
        find_compiler()
        runtime_command()
    except MetalError as error:
        pytest.skip(error.message)
