"""Which names a request may call this server by, and which web pages may use it.

Any web page that a user opens can send requests to a server on the user's machine: it names the address itself, or
lets its own name resolve to 127.0.0.1 (DNS rebinding). API keys stop both. Without keys, a server on a loopback
address therefore refuses names that are not of this machine in `Host` and, if it is there, in `Origin`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from daemon.api.errors import forbidden
from daemon.config import Config

_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
    "Access-Control-Allow-Headers": "*, Authorization",
    "Access-Control-Max-Age": "600",
}
_EXPOSED = "x-request-id, Retry-After, X-Llumd-Stream"
_LOCAL_NAMES = frozenset({"localhost", "ip6-localhost", "ip6-loopback", "host.docker.internal"})


class OriginPolicy:
    """The checks of `Host` and `Origin` that the configuration asks for. Pure."""

    def __init__(self, config: Config, *, keys: bool) -> None:
        """`keys`: clients need an API key."""
        local = not keys and (config.host.lower() == "localhost" or _is_loopback(config.host))
        hosts = {host.lower() for host in config.allowed_hosts}
        self._any_host = "*" in hosts or not (hosts or local)
        self._hosts = hosts | {config.host.lower()}
        self._local = local
        self._origins = {origin.lower().rstrip("/") for origin in config.allowed_origins}

    def check(self, host: str | None, origin: str | None) -> None:
        """Raise ApiError (403) for a request with these headers; None: the request has no such header."""
        if host and not self._any_host and not self._knows(host_name(host)):
            raise forbidden(
                f"This server does not accept the name {_shown(host)} in `Host`. Use localhost or 127.0.0.1, or let "
                "the operator add the name to the option allowed_hosts."
            )
        if origin and self._local and not self.allows(origin):
            raise forbidden(
                f"Web pages of {_shown(origin)} may not use this server. The operator can add this origin to the "
                "option allowed_origins."
            )

    def allows(self, origin: str) -> bool:
        """Return True if a page of this origin may use the server."""
        if "*" in self._origins or origin.lower() in self._origins:
            return True
        scheme = origin.partition("://")[0].lower()
        if not self._local or origin == "null":
            return False
        # No web site has another scheme than these two: vscode-webview and the like are programs of the user.
        return scheme not in ("http", "https") or _is_local(host_name(origin.partition("://")[2]))

    def response_headers(self, origin: str | None, *, preflight: bool = False) -> Mapping[str, str]:
        """Return the CORS headers of the response to a request with this `Origin`."""
        if not origin or not self.allows(origin):
            return {}
        headers = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        return headers | (_PREFLIGHT if preflight else {"Access-Control-Expose-Headers": _EXPOSED})

    def _knows(self, name: str) -> bool:
        # A rebound name is a name: a browser that sends an address as `Host` has connected to that address.
        return name in self._hosts or _is_local(name) or _address(name) is not None


def host_name(host: str) -> str:
    """Return the name or address in a `Host` header, without port, brackets and final dot, in lower case."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
    return name.lower().rstrip(".")


def _is_local(name: str) -> bool:
    """Return True for names and addresses that mean this machine, seen from it or from its containers."""
    if name in _LOCAL_NAMES or name.endswith(".localhost"):
        return True
    address = _address(name)
    return address is not None and (address.is_loopback or address.is_unspecified)


def _is_loopback(name: str) -> bool:
    address = _address(name)
    return address is not None and address.is_loopback


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the address that `name` is, an IPv4 address also in its IPv6 form; None if it is a name."""
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _shown(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:80])
