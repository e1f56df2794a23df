"""Our own description of the API, and requests drawn from it by schemathesis: whatever comes in, no 5xx comes out."""

from contextlib import suppress
from typing import Any

import pytest

from tests.serving.fake_engine import FakeEngine
from tests.serving.running import Running, running

schemathesis = pytest.importorskip(
    "schemathesis",
    reason="schemathesis, which draws requests from an OpenAPI description, is not installed",
)
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

MAX_EXAMPLES = 30


@pytest.fixture(scope="module")
def server() -> Any:
    with running(lambda _: FakeEngine()) as found:
        yield found


def test_it_describes_every_route(server: Running) -> None:
    description = server.ask("GET", "/openapi.json")[2]
    assert set(description["paths"]) == {
        *("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{name}"),
        *("/health", "/metrics"),
    }
    body = description["components"]["schemas"]["ChatRequest"]
    assert body["additionalProperties"] is False
    assert {"messages", "temperature", "top_k", "deadline_s"} <= set(body["properties"])


def _check(server: Running, method: str, path: str) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operation = schema[path][method]
    modes = schemathesis.GenerationMode

    @seed(7)
    @settings(
        max_examples=MAX_EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=st.one_of(*[operation.as_strategy(generation_mode=mode) for mode in modes]))
    def run(case: Any) -> None:
        response = case.call()
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["message"]

    with suppress(
        SystemError
    ):  # of CPython 3.11's ast.parse, by which hypothesis describes lambdas
        run()
        return
    run()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/{name}"),
        ("GET", "/metrics"),
    ],
)
def test_no_request_breaks_the_server(server: Running, method: str, path: str) -> None:
    _check(server, method, path)
