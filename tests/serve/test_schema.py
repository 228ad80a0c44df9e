"""Requests made from the OpenAPI file, as it allows and as it forbids: nothing that is sent is a mistake of ours."""

from typing import Any

import httpx
import pytest

schemathesis = pytest.importorskip("schemathesis")
hypothesis = pytest.importorskip("hypothesis")

POSTS = [("POST", "/v1/completions"), ("POST", "/v1/chat/completions")]
GETS = [("GET", "/v1/models"), ("GET", "/v1/models/{name}"), ("GET", "/health")]  # there is nothing to get wrong
MODES = ("positive", "negative")
CASES = [(*post, mode) for post in POSTS for mode in MODES] + [(*get, "positive") for get in GETS]
QUESTION = {"model": "tiny", "prompt": "After the night ", "max_tokens": 20, "temperature": 0}
# Left out: what fits the schema may still name a token that there is not, or be longer than the context.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
)


def try_all(served: Any, method: str, path: str, mode: str, examples: int) -> None:
    from schemathesis.checks import CHECKS as KNOWN

    schema = schemathesis.openapi.from_dict(httpx.get(f"{served.url}/openapi.json").json())
    operation = schema[path][method]
    statuses = []

    def once(case: Any) -> None:
        answer = case.call(base_url=served.url)
        statuses.append(answer.status_code)
        if answer.status_code >= 400:
            error = answer.json()["error"]
            assert error.keys() == {"message", "type", "param", "code"} and error["message"]
        elif b"data: " in answer.content[:6]:
            assert answer.content.endswith(b"data: [DONE]\n\n")
        case.validate_response(answer, checks=[KNOWN.get_one(name) for name in CHECKS])

    before = httpx.post(f"{served.url}/v1/completions", json=QUESTION).json()["choices"]
    run = hypothesis.given(operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))(once)
    hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )(run)()
    assert mode == "negative" or path == "/v1/models/{name}" or 200 in statuses
    assert served.idle(5)
    assert httpx.get(f"{served.url}/health").status_code == 200
    assert httpx.post(f"{served.url}/v1/completions", json=QUESTION).json()["choices"] == before


@pytest.fixture(scope="module")
def tried(serving) -> Any:
    """A server whose answers are short: what is asked for is not the question here."""
    return serving(context=32, texts=8)


@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_whatever_is_sent_is_answered_or_refused(tried, method, path, mode):
    try_all(tried, method, path, mode, 25)


@pytest.mark.slow  # a thousand requests an endpoint
@pytest.mark.parametrize(("method", "path", "mode"), [one for one in CASES if one[0] == "POST"])
def test_a_thousand_times_it_is_answered_or_refused(tried, method, path, mode):
    try_all(tried, method, path, mode, 500)
