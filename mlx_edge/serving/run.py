"""Runs the application in uvicorn until a signal ends it: the first one drains, the second one does not wait."""

import logging
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn

from mlx_edge.errors import InvalidRequestError
from mlx_edge.serving.app import make_app
from mlx_edge.serving.connection import Connection
from mlx_edge.serving.models import MakeEngine, Models, make_engine
from mlx_edge.serving.security import MAX_HEAD_BYTES
from mlx_edge.serving.settings import Settings

logger = logging.getLogger(__name__)

BACKLOG = 512


class Server(uvicorn.Server):
    """uvicorn's server, which ends with exit code 0 when it was asked to end."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handle both signals; unlike uvicorn's, do not raise them again afterwards."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        try:
            before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        except ValueError:  # not the main thread: whoever started it ends it
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain; at the second signal, end at once."""
        self.force_exit = self.should_exit
        self.should_exit = True


def make_server(settings: Settings, make: MakeEngine = make_engine) -> tuple[Server, Models]:
    """A server that is not started, and its models, of which none is loaded."""
    own = settings.server
    models = Models(settings, make)
    config = uvicorn.Config(
        make_app(settings, models),
        host=own.host,
        port=own.port,
        http=Connection.make(own.head_timeout_s, own.write_timeout_s),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=own.max_connections,
        backlog=BACKLOG,
        timeout_keep_alive=own.idle_timeout_s,
        timeout_graceful_shutdown=own.drain_timeout_s,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
    )
    return Server(config), models


def serve(settings: Settings) -> None:
    """Load the first model unless told to be lazy, and serve until a signal comes.

    Raises: MLXEdgeError for a model that cannot be loaded, InvalidRequestError for an address that is taken or a
    folder of models that is none.
    """
    logging.basicConfig(
        level=settings.server.log_level, format="%(asctime)s %(levelname)s %(message)s"
    )
    for name in ("uvicorn", "asyncio", "httpx", "huggingface_hub"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.root.level))
    folder = settings.server.model_dir
    if folder is not None and not Path(folder).is_dir():
        raise InvalidRequestError(f"--model-dir {folder} is no folder; make it, or name another")
    server, models = make_server(settings)
    with bind(settings.server.host, settings.server.port) as listener:
        if not settings.server.lazy:
            models.preload()
        host, port = listener.getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        logger.info("serving %s on http://%s", ", ".join(models.known()), address)
        server.run([listener])


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address, taken before anything is loaded. Raises: InvalidRequestError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise InvalidRequestError(
            f"cannot listen on {host}, port {port}: {error.strerror}; choose another --host or --port"
        ) from None
    return listener
