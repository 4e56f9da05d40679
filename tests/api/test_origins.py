"""`Host` and `Origin`: a web page must not use a server on its user's machine."""

from __future__ import annotations

import pytest

from daemon.api.errors import ApiError
from daemon.api.origins import OriginPolicy
from daemon.config import Config
from tests.api.harness import CHAT, HELLO, make_api, with_client


def policy(keys: bool = False, **options: object) -> OriginPolicy:
    return OriginPolicy(Config(**options), keys=keys)


LOCAL = [
    "localhost",
    "localhost:8000",
    "LOCALHOST",
    "127.0.0.1:8000",
    "127.8.9.1",
    "[::1]:8000",
    "a.localhost",
    "localhost.",
    "0.0.0.0:8000",
    "[::]:8000",
    "[::ffff:127.0.0.1]:8000",
    "host.docker.internal:8000",
]
FOREIGN = [
    *("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "x@evil.example"),
    *("[", "localhost.evil"),
]
ADDRESSES = ["192.168.1.7", "192.168.1.7:8000", "[fe80::1]"]


@pytest.mark.parametrize("host", LOCAL)
def test_names_of_this_machine_are_accepted(host):
    policy().check(host, None)
    policy().check(host, f"http://{host}")
    policy().check(None, None)


@pytest.mark.parametrize("host", FOREIGN)
def test_other_names_are_refused_on_a_loopback_address_without_keys(host):
    with pytest.raises(ApiError, match="allowed_hosts") as refused:
        policy().check(host, None)
    assert refused.value.status == 403
    with pytest.raises(ApiError, match="allowed_origins"):
        policy().check("localhost", f"https://{host}")


@pytest.mark.parametrize("host", ADDRESSES)
def test_a_page_of_another_machine_is_refused_although_an_address_as_host_is_not(host):
    """A browser that sends an address as `Host` has connected to that address, so it is no rebound name."""
    policy().check(host, None)
    with pytest.raises(ApiError, match="allowed_origins"):
        policy().check("localhost", f"http://{host}")


def test_probes_reach_a_server_whose_proxy_has_a_name():
    server = policy(keys=True, host="0.0.0.0", allowed_hosts=["llm.example"])
    for host in ("llm.example", "127.0.0.1:8000", "localhost:8000", "10.1.2.3:8000"):
        server.check(host, None)
    with pytest.raises(ApiError, match="allowed_hosts"):
        server.check("other.example", None)


def test_servers_with_keys_or_on_a_network_accept_every_name():
    for server in (policy(keys=True), policy(host="0.0.0.0", allow_unauthenticated=True)):
        server.check("llm.example", "https://chat.example")
        assert not server.allows("https://chat.example")


def test_options_extend_what_is_accepted():
    server = policy(allowed_hosts=["llm.example"], allowed_origins=["https://chat.example"])
    server.check("llm.example:443", "https://chat.example")
    server.check("localhost", "http://localhost:3000")
    assert server.response_headers("https://chat.example")["Access-Control-Allow-Origin"] == "https://chat.example"
    assert server.response_headers("https://other.example") == {}
    with pytest.raises(ApiError):
        policy(keys=True, allowed_hosts=["llm.example"]).check("evil.example", None)
    policy(allowed_hosts=["*"], allowed_origins=["*"]).check("evil.example", "http://evil.example")


@pytest.mark.parametrize(
    ("origin", "allowed"), [("null", False), ("vscode-webview://x", True), ("app://obsidian.md", True)]
)
def test_programs_of_the_user_are_no_web_sites(origin, allowed):
    assert policy().allows(origin) is allowed


def test_a_page_elsewhere_reaches_nothing_and_a_page_of_this_machine_may_ask_first(api):
    async def body(client):
        for method, path in (("GET", "/v1/models"), ("GET", "/health"), ("POST", CHAT), ("GET", "/nothing")):
            response = await client.request(method, path, json=HELLO, headers={"Host": "evil.example"})
            assert response.status == 403
            assert set((await response.json())["error"]) == {"message", "type", "param", "code"}
        evil, local = {"Origin": "http://evil.example"}, {"Origin": "http://localhost:3000"}
        response = await client.post(CHAT, json=HELLO, headers=evil)
        assert response.status == 403 and "Access-Control-Allow-Origin" not in response.headers
        asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
        response = await client.options(CHAT, headers=local | asks)
        assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (204, local["Origin"])
        assert (await client.options(CHAT, headers=evil | asks)).status == 403
        for stream in (False, True):
            response = await client.post(CHAT, json=HELLO | {"stream": stream}, headers=local)
            assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (200, local["Origin"])
            await response.read()

    with_client(api, body)
    assert len(api.generator.submissions) == 2


def test_preflight_needs_no_key_and_the_request_does(model):
    api = make_api(model, keys=["a-key"], allowed_origins=["https://chat.example"])

    async def body(client):
        headers = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
        response = await client.options(CHAT, headers=headers)
        assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (204, "https://chat.example")
        response = await client.post(CHAT, json=HELLO, headers={"Origin": "https://chat.example"})
        assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (401, "https://chat.example")

    with_client(api, body)
