"""The application: routes, and around them who is answered, what is counted and how errors are told."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp

from mlx_edge.errors import MLXEdgeError
from mlx_edge.profiler.memory import resident_bytes
from mlx_edge.runtime import own_version
from mlx_edge.serving.answer import respond
from mlx_edge.serving.chat import ChatAnswer
from mlx_edge.serving.completions import CompletionAnswer
from mlx_edge.serving.errors import invalid, of_exception, of_validation
from mlx_edge.serving.metrics import Watched
from mlx_edge.serving.models import Models
from mlx_edge.serving.security import Guard, Refusals
from mlx_edge.serving.settings import Settings
from mlx_edge.serving.wire import FIELDS, ChatRequest, CompletionRequest

logger = logging.getLogger(__name__)

PAGE = {  # what there is at /, and nothing else
    "index.html": "text/html; charset=utf-8",
    "chat.css": "text/css; charset=utf-8",
    "chat.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"description": words}
    for code, words in (
        (400, "a field is missing, unknown, wrong or too large; the message names it"),
        (401, "the API key is missing or wrong"),
        (403, "this host or origin is not answered"),
        (404, "no such model"),
        (413, "the body is too large"),
        (429, "too many requests wait already"),
        (503, "the server is closing"),
    )
}


class JsonRequest(HttpRequest):
    """Reads JSON of a bounded depth (about 200), in Rust, and without NaN."""

    async def json(self) -> Any:
        """The body. Raises: ApiError."""
        if not hasattr(self, "_json"):
            try:
                self._json = from_json(await self.body(), allow_inf_nan=False, cache_strings="none")
            except ValueError as error:
                raise invalid(f"the body is not JSON: {error}", code="invalid_json") from None
        return self._json


class JsonRoute(APIRoute):
    """A route whose body is read so."""

    def get_route_handler(self) -> Callable[[HttpRequest], Any]:
        """FastAPI's handler with our request."""
        handle = super().get_route_handler()

        async def handle_json(request: HttpRequest) -> Response:
            response: Response = await handle(JsonRequest(request.scope, request.receive))
            return response

        return handle_json


def make_app(settings: Settings, models: Models) -> ASGIApp:
    """The ASGI application; it unloads the models when it ends."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        sweeping = asyncio.ensure_future(models.sweep())
        try:
            yield
        finally:
            sweeping.cancel()
            with suppress(asyncio.CancelledError):
                await sweeping
            await models.close(settings.server.drain_timeout_s)

    app = FastAPI(
        title="mlx_edge", version=own_version(), docs_url=None, redoc_url=None, lifespan=lifespan
    )
    app.include_router(_generation_routes(settings, models))
    app.include_router(_other_routes(models))
    app.add_exception_handler(RequestValidationError, _answer_validation)
    for kind in (HTTPException, MLXEdgeError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _answer_error)
    return Watched(Guard(Refusals(app), settings.server), models.metrics)


def _generation_routes(settings: Settings, models: Models) -> APIRouter:
    router = APIRouter(route_class=JsonRoute, responses=ERRORS)

    async def chat(http: HttpRequest, body: ChatRequest) -> Response:
        """The next message of a conversation."""
        client = _client(http)
        return await respond(
            http, models, body, lambda served: ChatAnswer(body, served, settings, client)
        )

    async def complete(http: HttpRequest, body: CompletionRequest) -> Response:
        """What follows a text."""
        client = _client(http)
        return await respond(
            http,
            models,
            body,
            lambda served: CompletionAnswer(body, served, settings.defaults, client),
        )

    add = router.add_api_route
    add("/v1/chat/completions", chat, methods=["POST"])
    add("/chat/completions", chat, methods=["POST"], include_in_schema=False)
    add("/v1/completions", complete, methods=["POST"])
    return router


def _other_routes(models: Models) -> APIRouter:
    router = APIRouter()

    async def list_models() -> dict[str, Any]:
        """All models that are served; `x_` fields are ours."""
        return {"object": "list", "data": [_describe(models, name) for name in models.known()]}

    async def show_model(name: str) -> dict[str, Any]:
        """One model."""
        return _describe(models, models.find(name).name)

    async def health() -> dict[str, str]:
        """Whether the server answers."""
        return {"status": "ok"}

    async def metrics() -> Response:
        """Figures for Prometheus."""
        text = await asyncio.to_thread(models.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(name: str = "index.html") -> Response:
        """The chat page."""
        if name not in PAGE:
            raise HTTPException(404)
        data = files("mlx_edge.serving").joinpath("page", name).read_bytes()
        return Response(data, media_type=PAGE[name])

    router.add_api_route("/v1/models", list_models, methods=["GET"])
    router.add_api_route(
        "/v1/models/{name:path}", show_model, methods=["GET"], responses={404: ERRORS[404]}
    )
    router.add_api_route("/health", health, methods=["GET"])
    router.add_api_route("/metrics", metrics, methods=["GET"], response_class=Response)
    router.add_api_route("/", page, methods=["GET"], include_in_schema=False)
    router.add_api_route("/page/{name}", page, methods=["GET"], include_in_schema=False)
    return router


def _describe(models: Models, name: str) -> dict[str, Any]:
    """A model as OpenAI lists it, with what is known of it while it is loaded."""
    found = {"id": name, "object": "model", "created": models.started, "owned_by": "mlx_edge"}
    served = models.loaded().get(name)
    if served is None:
        return {**found, "x_loaded": False}
    stats = served.engine.stats()
    return {
        **found,
        "x_loaded": True,
        "x_context_size": served.engine.context_size,
        "x_takes_images": served.engine.image_token_id is not None,
        "x_requests": {"running": stats.running, "waiting": stats.waiting},
        "x_memory": {
            "process_bytes": resident_bytes(),
            "reserved_bytes": stats.reserved_bytes,
            "budget_bytes": stats.budget_bytes,
            "kv_bytes": stats.kv_bytes,
            "prefix_bytes": stats.prefix_bytes,
        },
        "x_row_exactness": stats.row_exactness,
    }


def _client(http: HttpRequest) -> str:
    """Whose requests take turns, where the body names no `user`."""
    return http.client.host if http.client else ""


async def _answer_validation(_http: HttpRequest, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return of_validation(error.errors(), FIELDS).response()


async def _answer_error(_http: HttpRequest, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=408)  # nobody reads it
    return of_exception(error).response()
