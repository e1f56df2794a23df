"""Options of `scripts/mutate_kernels.py`: tests on another folder of kernels, and what they have found."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from mlx_edge.ops import metal_launch
from mlx_edge.ops.metal import missing_for_emulator

WITHOUT_GPU = {"test_donation.py", "test_sources.py"}
LIMIT_MS = 20_000  # of one launch: a seeded bug may loop for ever


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--metal-kernels", type=Path, help="kernels to test instead of those here")
    parser.addoption("--first-failure", type=Path, help="write a JSON file that says what failed")


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--metal-kernels", None)
    report = config.getoption("--first-failure", None)
    if folder is not None:
        metal_launch._folder = lambda: folder  # read_source has not been called yet
    if report is not None:
        config.pluginmanager.register(FirstFailure(report))


@pytest.fixture(autouse=True)
def emulated_gpu(request: pytest.FixtureRequest) -> None:
    """Skip in words where kernels cannot run."""
    lacking = missing_for_emulator()
    if lacking is not None and request.node.path.name not in WITHOUT_GPU:
        pytest.skip(f"no emulated GPU: {lacking}")


class FirstFailure:
    """Notes the first test that fails with the kind of the emulator's finding, and a digest of the code that ran."""

    def __init__(self, report: Path) -> None:
        self._report = report
        self._found: dict[str, Any] = {}
        self._libraries: set[Path] = set()

    def pytest_sessionstart(self) -> None:
        from metal_emulator import device, runtime

        runtime.load_runtime().emu_limit_time(LIMIT_MS)
        compile_generated = device.compile_generated

        def noting(*args: Any) -> Any:
            kernel = compile_generated(*args)
            self._libraries.add(kernel.library)
            return kernel

        device.compile_generated = noting

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = (yield).get_result()
        if report.failed and not self._found and call.excinfo is not None:
            error = call.excinfo.value
            self._found = {
                "test": item.nodeid,
                "message": str(error)[:300],
                "kind": getattr(error, "kind", None),
            }

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self._found:
            self._found = {"test": report.nodeid, "message": str(report.longrepr)[-300:]}

    def pytest_sessionfinish(self) -> None:
        codes = sorted(hashlib.sha256(_code(path)).hexdigest() for path in self._libraries)
        digest = hashlib.sha256(" ".join(codes).encode()).hexdigest()
        self._report.write_text(json.dumps(self._found | {"code": digest}))


def _code(library: Path) -> bytes:
    """What a library computes: its machine code and constants (ELF), without the lines they came from."""
    data = library.read_bytes()
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<3H", data, 0x3A)
    headers = [struct.unpack_from("<2I4Q", data, table + i * size) for i in range(count)]

    def name(header: tuple[int, ...]) -> bytes:
        begin = headers[names][4] + header[0]
        return data[begin : data.index(b"\0", begin)]

    kept = [h for h in headers if name(h).startswith((b".text", b".rodata"))]
    return b"".join(data[header[4] : header[4] + header[5]] for header in kept)
