"""`python -m mlx_edge.serve`: language models over OpenAI's HTTP API, and a chat page at /.

Reads flags and a TOML file; the server itself is in `serving/`. Flags have the names of mlx_lm.server's.
"""

import sys

from mlx_edge.command import run_command
from mlx_edge.errors import InvalidRequestError
from mlx_edge.serving.flags import make_parser, read_flags
from mlx_edge.serving.settings import read_settings

PROG = "mlx_edge.serve"


def serve_models(argv: list[str] | None) -> None:
    """Read what is asked for, then serve until a signal comes."""
    args = make_parser(PROG).parse_args(argv)
    settings = read_settings(args.config, read_flags(args))
    try:
        # Imported here, so that a wrong flag or --help is answered at once.
        from mlx_edge.serving.run import serve
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mlx_edge"):
            raise
        raise InvalidRequestError(
            f"the server needs {error.name}, which is not installed: pip install 'mlx-edge[serve]'"
        ) from None
    serve(settings)


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0, or 2 after a line that says what was wrong."""
    return run_command(PROG, serve_models, argv)


if __name__ == "__main__":
    sys.exit(main())
