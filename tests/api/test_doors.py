"""The ways in which clients name a route, a model and their key."""

from __future__ import annotations

import json

import pytest

from daemon.api.routes.spellings import candidates
from tests.api.harness import CHAT, HELLO, TEXT, make_api, with_client

TAILS = ["chat/completions", "completions"]

SAME = {
    CHAT: [
        *("/chat/completions", "/v1/chat/completions/", "/chat/completions//", "//v1/chat/completions"),
        *("/v1//chat/completions", "/v1/v1/chat/completions", "/openai/v1/chat/completions"),
        *("/openai/deployments/tiny/chat/completions?api-version=2024-10-21", "/v1/chat/completions?x=1"),
    ],
    TEXT: ["/completions", "/v1/completions/", "/openai/deployments/tiny/completions"],
    "/v1/models": ["/models", "/v1/models/", "/openai/v1/models", "/openai/models?api-version=2024-10-21"],
    "/v1/models/tiny": ["/models/tiny", "/v1/models/tiny/", "//models/tiny"],
    "/tokenize": ["/v1/tokenize", "/tokenize/"],
    "/health": ["/health/", "//health", "/v1/health"],
    "/ping": ["/ping/"],
}


@pytest.mark.parametrize("path", SAME)
def test_other_spellings_of_a_path_mean_the_same_route(api, path):
    body_of = {CHAT: HELLO, TEXT: {"prompt": "x"}, "/tokenize": {"prompt": "x"}}

    async def body(client):
        for spelling in (path, *SAME[path]):
            url = str(client.make_url("")) + spelling  # as it is: `//` at its beginning too
            if path in body_of:
                response = await client.session.post(url, json=body_of[path] | {"stream": path == CHAT})
            else:
                response = await client.session.get(url)
            assert response.status == 200, (spelling, await response.text())
            assert (await client.session.delete(url)).status == 405, spelling

    with_client(api, body)


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/openai/deployments/org/name/chat/completions", [("/v1/chat/completions", "org/name")]),
        ("/openai/deployments/org%2Fname/completions/", [("/v1/completions", "org/name")]),
        ("/openai/deployments/x/embeddings", []),
        ("/openai/deployments/chat/completions", [("/v1/completions", "chat")]),
        ("/", []),
        ("/v1/", []),
        ("/a/", [("/v1/a", ""), ("/a", "")]),
    ],
)
def test_what_a_path_may_mean(path, meant):
    assert list(candidates(path, TAILS)) == meant


def test_no_spelling_is_public_by_mistake(model):
    api = make_api(model, keys=["secret"])

    async def body(client):
        for path in ("/v1/models", "//models", "/openai/v1/models/", "/version", "/load", "/v1/nothing", "/metrics/"):
            url = str(client.make_url("")) + path
            assert (await client.session.get(url)).status == 401, path
        for path in ("/health", "/health/", "/ping", "/v1/health/ready"):
            assert (await client.get(path)).status == 200, path

    with_client(api, body)


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer secret"},
        {"Authorization": "bearer  secret"},
        {"api-key": "secret"},
        {"x-api-key": "secret"},
        {"X-Api-Key": " secret "},
        {"Authorization": "Basic dTpw", "x-api-key": "secret"},
        {"Authorization": "Bearer none", "api-key": "secret"},
    ],
)
def test_a_key_in_any_header_is_accepted(model, headers):
    api = make_api(model, keys=["secret tenant=a"])

    async def body(client):
        assert (await client.post(TEXT, json={"prompt": "x"}, headers=headers)).status == 200

    with_client(api, body)
    assert api.generator.admitted[0][1] == "tenant a"


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, "didn't provide"),
        ({"api-key": ""}, "didn't provide"),
        ({"api-key": "wrong"}, "Incorrect"),
        ({"x-api-key": "Bearer secret"}, "Incorrect"),
        ({"x-api-key": "ÿ"}, "Incorrect"),
        ({"Authorization": "secret"}, "Incorrect"),
        ({"Authorization": "Basic secret"}, "Incorrect"),
    ],
)
def test_other_keys_are_refused(model, headers, message):
    async def body(client):
        response = await client.post(TEXT, json={"prompt": "x"}, headers=headers)
        error = (await response.json())["error"]
        assert (response.status, error["code"]) == (401, "invalid_api_key") and message in error["message"]

    with_client(make_api(model, keys=["secret"]), body)


def test_every_name_of_the_model_answers_and_the_first_is_the_one_of_answers(model):
    api = make_api(model, served_name=["tiny", "gpt-4o", "org/tiny"])  # of the model `demo`

    async def body(client):
        listed = (await (await client.get("/v1/models")).json())["data"]
        assert [(m["id"], m["root"]) for m in listed] == [(n, "tiny") for n in ("tiny", "gpt-4o", "org/tiny")]
        for name in ("tiny", "gpt-4o", "org/tiny", "demo"):
            answer = await client.post(CHAT, json=HELLO | {"model": name})
            assert (answer.status, (await answer.json())["model"]) == (200, "tiny")
            assert (await (await client.get(f"/v1/models/{name}")).json())["id"] == name
        answer = await client.post(CHAT, json=HELLO | {"model": "other"})
        assert answer.status == 404 and "`tiny`, `gpt-4o`, `org/tiny`" in await answer.text()

    with_client(api, body)


def test_the_model_in_the_path_goes_before_the_one_in_the_body(api):
    async def body(client):
        for model, status in (("tiny", 200), ("other", 404), ("tiny/", 200)):
            url = f"/openai/deployments/{model}/chat/completions?api-version=2024-10-21"
            response = await client.post(url, json=HELLO | {"model": "gpt-4o"})
            assert response.status == status

    with_client(api, body)


REFUSED = {
    ("POST", "/v1/embeddings"): "embeddings",
    ("POST", "/embeddings/"): "embeddings",
    ("POST", "/openai/deployments/tiny/embeddings"): "embeddings",
    ("POST", "/openai/deployments/org/tiny/audio/speech"): "Audio",
    ("POST", "/v1/audio/transcriptions"): "Audio",
    ("POST", "/v1/images/generations"): "images",
    ("GET", "/v1/files"): "no files",
    ("GET", "/v1/files/abc/content"): "no files",
    ("POST", "/v1/batches"): "low",
    ("POST", "/v1/moderations"): "moderate",
    ("POST", "/rerank"): "score",
    ("GET", "/v1/chat/completions/chatcmpl-1"): "stores no answers",
    ("POST", "/api/chat"): "/v1/chat/completions",
}


@pytest.mark.parametrize(("method", "path"), REFUSED)
def test_known_paths_without_a_route_say_why(api, method, path):
    async def body(client):
        response = await client.request(method, path, json={})
        error = (await response.json())["error"]
        assert (response.status, error["code"], error["type"]) == (404, "unsupported_url", "invalid_request_error")
        assert REFUSED[method, path] in error["message"]

    with_client(api, body)


def test_other_paths_are_unknown(api):
    async def body(client):
        for path in ("/", "/v1", "/v1/chat", "/v1/chat/completion", "/x/v1/models", "/openai/deployments/"):
            response = await client.post(path, json={})
            assert (response.status, (await response.json())["error"]["code"]) == (404, "unknown_url"), path

    with_client(api, body)


def test_probes(api):
    async def body(client):
        for method in ("GET", "POST"):
            assert (await client.request(method, "/ping")).status == 200
        assert set(json.loads(await (await client.get("/version")).text())) == {"version"}
        assert json.loads(await (await client.get("/load")).text()) == {"server_load": 0}
        api.generator.ready = False
        assert (await client.get("/ping")).status == 503 and (await client.get("/health")).status == 200

    with_client(api, body)
