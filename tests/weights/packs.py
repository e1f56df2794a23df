"""Packed weights that are known byte for byte, and processes to pack them in."""

import logging
import os

import numpy as np

from mlx_edge.weights import Part, open_packed

PARTS = (Part("q", 10_000), Part("empty", 0), Part("norm", 3), Part("head", 300_001))


def content(part):
    seed = sum(map(ord, part.name))
    return np.random.default_rng(seed).integers(0, 256, part.num_bytes, dtype=np.uint8)


class Filler:
    """Fills parts with bytes that are known, and counts."""

    def __init__(self):
        self.calls = []

    def __call__(self, part, view):
        assert len(view) == part.num_bytes
        assert not any(view[:100])
        assert not any(view[-100:])
        self.calls.append(part.name)
        view[:] = content(part).tobytes()


def is_right(file, parts=PARTS):
    return all(bytes(file.parts[part.name]) == content(part).tobytes() for part in parts)


def open_at(folder, fill=None, *, key="k", parts=PARTS, **options):
    return open_packed(key, parts, fill or Filler(), folder=folder, **options)


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def in_child(work):
    """Runs `work` in a forked process and returns what it returns, an int below 100; 99 means it raised."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
