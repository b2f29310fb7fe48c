"""Refuses what a web page can send: a foreign Host (DNS rebinding), a foreign Origin, a body that is not JSON.

A browser lets a page send a text/plain body to any address without asking the server first.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from aiohttp import web

from protocol.addresses import is_loopback_host

_SAME_SITE = ("none", "same-origin")


@dataclass(frozen=True, slots=True)
class OriginCheck:
    """`host`, `port`: where the server listens. `advertised`: its URL for actors, if it is another one."""

    host: str
    port: int
    advertised: str | None = None

    def refusal(self, request: web.Request) -> tuple[int, str] | None:
        """Returns (HTTP status, reason) if the request must be refused, else None."""
        headers = request.headers
        if not self._is_own(headers.get("Host", "")):
            return 403, f"the Host header must be the engine's address, got {headers.get('Host', ''):.100}"
        origin = headers.get("Origin")
        if origin is not None and not self._is_own(urlsplit(origin).netloc):
            return 403, f"requests of web pages are refused, got Origin {origin:.100}"
        if headers.get("Sec-Fetch-Site", "none") not in _SAME_SITE:
            return 403, "requests of web pages are refused, got a Sec-Fetch-Site header"
        if request.can_read_body and request.content_type != "application/json":
            return 415, f"the Content-Type of a body must be application/json, got {request.content_type:.100}"
        return None

    def _is_own(self, netloc: str) -> bool:
        """Whether HOST:PORT names this server."""
        try:
            parts = urlsplit(f"//{netloc}")
            host, port = parts.hostname or "", parts.port
        except ValueError:
            return False
        if self.advertised is not None:
            own = urlsplit(self.advertised)
            if host == own.hostname and port in (own.port, None if own.port in (80, 443) else own.port):
                return True
        if port != self.port:
            return False
        return host == self.host or is_loopback_host(host) or (self._is_wildcard() and _is_ip(host))

    def _is_wildcard(self) -> bool:
        return _is_ip(self.host) and ipaddress.ip_address(self.host).is_unspecified


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
