"""What every command shares: one line per error, exit codes, quiet Ctrl-C and closed pipes. Loads no MLX."""

import argparse
import math
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from mlx_edge.errors import MLXEdgeError

USAGE_ERROR = 2
INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_silent = action.default is None or action.default is False or action.default == []
        return action.help if is_silent else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations and reports an error in one line."""

    def __init__(self, *, prog: str, description: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=_HelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Print the message and where help is; exit with 2."""
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message} (see --help)\n")


def number(low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argument type: a finite number from `low` to `high`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not {_range('a number', low, high)}")
        return value

    return parse


def integer(low: int, high: int = 1 << 31) -> Callable[[str], int]:
    """An argument type: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {_range('a whole number', low, high)}"
            )
        return value

    return parse


def _range(kind: str, low: float, high: float) -> str:
    return f"{kind} from {low:g}" + (f" to {high:g}" if math.isfinite(high) else "")


def truth(text: str) -> bool:
    """An argument type: "true" or "false", as in mlx-lm's `--verbose False`."""
    values = {"true": True, "t": True, "1": True, "yes": True}
    values |= {"false": False, "f": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[text.lower()]


def run_command(prog: str, body: Callable[[list[str] | None], None], argv: list[str] | None) -> int:
    """Run a command's body; turn what a user can cause into one line on stderr and an exit code."""
    try:
        body(argv)
        sys.stdout.flush()
    except MLXEdgeError as error:
        sys.stdout.flush()
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader left, as `head` does. Point stdout elsewhere, so that closing it does not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
