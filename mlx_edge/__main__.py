"""`mlx-edge NAME ...` and `python -m mlx_edge NAME ...`: the same as `python -m mlx_edge.NAME ...`."""

import sys
from importlib import import_module

from mlx_edge.command import USAGE_ERROR

COMMANDS = ("generate", "chat", "serve", "cache_prompt", "convert", "benchmark", "plan")


def main() -> int:
    """Run the named command with the arguments that follow it."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(
            f"usage: mlx-edge COMMAND ...; commands: {', '.join(COMMANDS)}; mlx-edge COMMAND --help"
        )
        return 0
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"mlx-edge: error: no command {name!r}; expected one of: {known}", file=sys.stderr)
        return USAGE_ERROR
    code: int = import_module(f"mlx_edge.{name}").main(sys.argv[2:])
    return code


if __name__ == "__main__":
    sys.exit(main())
