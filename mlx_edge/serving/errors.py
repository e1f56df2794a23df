"""What a client is told when something is wrong: the one place that knows status codes, in OpenAI's shape.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

Knows no routes. A fault of our own is a 500 without details; the details are in the log.
"""

import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from mlx_edge.errors import (
    EngineClosedError,
    MemoryBudgetError,
    MLXEdgeError,
    QueueFullError,
)

logger = logging.getLogger(__name__)

CODES: Mapping[int, str] = {
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "too_large",
    414: "too_large",
    415: "not_json",
    431: "too_large",
}
WORDS: Mapping[int, str] = {
    404: "there is nothing at this address; the API is at /v1/chat/completions, /v1/completions, /v1/models, "
    "/health and /metrics",
    405: "this address does not take this method",
}
NO_FIELDS = {"body", "str", "int", "list", "dict"}  # in pydantic's path, and in no field's
SHOWN_CHARACTERS = 400  # of a message that repeats what the client sent


class ApiError(HTTPException):
    """A refusal with everything that a client gets to see."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.kind, self.param, self.code = kind, param, code

    def body(self) -> dict[str, Any]:
        """The JSON that is sent."""
        message = " ".join(self.detail.split())
        if len(message) > SHOWN_CHARACTERS:
            message = message[: SHOWN_CHARACTERS - 3] + "..."
        error = {"message": message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status_code, dict(self.headers or {}))


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be served as it is."""
    return ApiError(400, message, param=param, code=code)


def unknown_model(name: str, known: Sequence[str]) -> ApiError:
    """A model that is not served."""
    message = f"the model {name[:100]!r} is not served here; expected one of: {', '.join(known)}"
    return ApiError(404, message, param="model", code="model_not_found")


def unauthorized(message: str) -> ApiError:
    """No key, or another one."""
    headers = {"WWW-Authenticate": "Bearer"}
    return ApiError(
        401, message, kind="authentication_error", code="invalid_api_key", headers=headers
    )


def forbidden(message: str, code: str) -> ApiError:
    """A host or an origin that this server does not answer."""
    return ApiError(403, message, kind="permission_error", code=code)


def too_large(message: str) -> ApiError:
    """A body over the limit."""
    return ApiError(413, message, code=CODES[413])


def too_long(message: str, status: int = 414) -> ApiError:
    """An address (414) or headers (431) over the limit."""
    return ApiError(status, message, code=CODES[status])


def timed_out(message: str) -> ApiError:
    """A client that stopped sending."""
    return ApiError(408, message, code=CODES[408], headers={"Connection": "close"})


def busy(message: str, retry_after_s: int = 1) -> ApiError:
    """Nothing is wrong with the request; there is no room for it now."""
    headers = {"Retry-After": str(retry_after_s)}
    return ApiError(429, message, kind="rate_limit_error", code="queue_full", headers=headers)


def closing(message: str) -> ApiError:
    """The server, or the model, is on its way out."""
    return ApiError(503, message, kind="server_error", code="closing", headers={"Retry-After": "5"})


def broken_model(name: str, error: MLXEdgeError) -> ApiError:
    """A served model that cannot be loaded: the operator's to mend."""
    logger.error("%s cannot be loaded: %s", name, error)
    message = f"the model {name!r} cannot be loaded; the server's log says why"
    return ApiError(500, message, kind="server_error", code="model_error")


def of_http(status: int, message: str) -> ApiError:
    """A refusal by the HTTP layer or the router: unknown path, wrong method, broken request."""
    headers = {"Connection": "close"} if status in {400, 431} else {}
    return ApiError(status, message, code=CODES.get(status), headers=headers)


def of_exception(error: BaseException) -> ApiError:
    """What a client is told of an exception; what is our own fault is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return of_http(error.status_code, WORDS.get(error.status_code, str(error.detail)))
    if isinstance(error, MemoryBudgetError):
        return invalid(str(error), code="memory_budget_exceeded")
    if isinstance(error, QueueFullError):
        return busy(str(error))
    if isinstance(error, EngineClosedError):
        return closing(str(error))
    if isinstance(error, MLXEdgeError):
        return invalid(str(error))
    logger.error("a request failed", exc_info=error)
    message = "the server failed at this request; its log says more"
    return ApiError(500, message, kind="server_error", code="internal_error")


class _Field(NamedTuple):
    """A place in a request: `messages.0.role`."""

    path: str
    name: str


def of_validation(problems: Sequence[Mapping[str, Any]], known: Sequence[str]) -> ApiError:
    """One clear line for the first of pydantic's problems; `known` are all names of fields that exist."""
    # Of a union every member complains; the one that got furthest is the one that was meant.
    problem = max(problems, key=lambda each: len(each["loc"]))
    field = _locate(problem["loc"])
    kind, words = problem["type"], problem["msg"]
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(field.name, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return invalid(f"unknown field {field.path[:100]!r}{hint}", field.path, "unknown_field")
    if kind == "refused_field":
        return invalid(words, problem["ctx"]["field"], "unsupported_field")
    if not field.path:
        is_json = kind != "missing" and not isinstance(problem.get("input"), bytes)
        return ApiError(
            400 if is_json else 415, "expected a JSON object with Content-Type: application/json"
        )
    if kind == "missing":
        return invalid(f"{field.path!r} is missing", field.path, "missing_field")
    if kind == "value_error":
        return invalid(words.removeprefix("Value error, "), field.path, "invalid_value")
    found = repr(problem.get("input"))
    found = found if len(found) <= 60 else found[:57] + "..."
    message = f"{field.path!r} is {found}: {words[:1].lower()}{words[1:]}"
    return invalid(message, field.path, "invalid_value")


def _locate(loc: Sequence[str | int]) -> _Field:
    """The path without what pydantic adds to it: "body", and the names of the members of a union."""
    plain = [str(part) for part in loc if part not in NO_FIELDS and not set("<[-") & set(str(part))]
    return _Field(".".join(plain), plain[-1] if plain else "")
