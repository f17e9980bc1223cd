"""What every request passes: no foreign host names, no fetching of addresses, no page inside another page."""

from __future__ import annotations

import signal
import threading

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
}
_FETCHING = ("file=http:", "file=https:", "file/http:", "file/https:", "/proxy=")


class Guard:
    """Refuses paths that would make the server fetch an address, and adds headers to every answer."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((key.encode(), value.encode()) for key, value in _HEADERS.items())]
            await send(message)

        if any(mark in scope["path"].lower() for mark in _FETCHING):
            await PlainTextResponse("Addresses are not fetched.", status_code=403)(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)


def middleware(*, local: bool) -> list[Middleware]:
    """Return what stands before the page; a local studio answers to local names only (against DNS rebinding)."""
    hosts = [Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])] if local else []
    return [*hosts, Middleware(Guard)]


def wait_for_the_end() -> None:
    """Wait for Ctrl-C or SIGTERM."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *anything: ended.set())
    while not ended.wait(1.0):
        pass
