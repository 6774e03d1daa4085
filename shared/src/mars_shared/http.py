"""What every HTTP service has: the API-key guard, limits, errors to status codes, health and metrics."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Generator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, disable_created_metrics, generate_latest
from prometheus_client.registry import Collector
from starlette.exceptions import HTTPException

from mars_shared.errors import ConfigError, MarsError, NotReadyError
from mars_shared.settings import Deployment

logger = logging.getLogger(__name__)
disable_created_metrics()  # a series beside every counter that says nothing which Prometheus uses

GRACEFUL_S = 5
"""How long requests in flight may hold a stop up."""
OPEN_PATHS = frozenset({"/healthz", "/readyz"})

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Message, Receive, Send], Awaitable[None]]


def is_loopback(host: str) -> bool:
    """Whether a host name or address reaches this machine alone."""
    name = host.strip("[]")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def check_bind(deployment: Deployment) -> None:
    """Refuse to serve beyond loopback without a key.

    Raises:
        ConfigError: MARS_HOST is not loopback and MARS_API_KEY is unset.
    """
    if deployment.api_key is None and not is_loopback(deployment.host):
        raise ConfigError(
            f"MARS_HOST={deployment.host} would serve beyond this machine without a key; set MARS_API_KEY or bind to 127.0.0.1"
        )


class Guard:
    """ASGI middleware: API key on every route but OPEN_PATHS, and a limit on request bodies.

    Without a key (loopback only) the Host header must name loopback, and the Origin if there is
    one, so that a web page that a browser on this machine shows cannot reach the service.
    """

    def __init__(self, app: AsgiApp, deployment: Deployment, open_paths: frozenset[str] = frozenset()) -> None:
        self._app = app
        self._open_paths = OPEN_PATHS | open_paths
        self._key = None if deployment.api_key is None else deployment.api_key.get_secret_value()
        self._max_body_bytes = deployment.max_body_mib * 2**20

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await _refuse_websocket(receive, send)

    async def _http(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            await _respond(send, *refusal)
            return
        limit = _BodyLimit(receive, self._max_body_bytes)
        answer = _Answer(send, limit)
        try:
            await self._app(scope, limit.receive, answer.send)
        except Exception:
            if not limit.passed or answer.begun:
                raise
        if limit.passed and not answer.begun:
            await _respond(send, 413, f"request body has more than {self._max_body_bytes} bytes, which is the most expected")

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        if path not in OPEN_PATHS and self._key is None:
            host = headers.get(b"host", b"").decode("latin-1")
            if not is_loopback(_without_port(host)):
                return 403, f"host {host!r} is not loopback and no API key is set; set MARS_API_KEY to serve other hosts"
            origin = headers.get(b"origin")
            if origin is not None and not is_loopback(_host_of(origin.decode("latin-1"))):
                return 403, f"origin {origin.decode('latin-1')!r} is not this machine and no API key is set"
        if path not in self._open_paths and self._key is not None and not self._has_key(headers):
            return 401, "expected the header 'Authorization: Bearer <MARS_API_KEY>'"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 20:
            return 400, "Content-Length is not a number"
        if int(length) > self._max_body_bytes:
            return 413, f"request body has {int(length)} bytes; expected at most {self._max_body_bytes}"
        return None

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        return hmac.compare_digest(headers.get(b"authorization", b""), f"Bearer {self._key}".encode())


class _BodyLimit:
    """Cuts a body off that has no Content-Length and passes the limit."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive = receive
        self._left_bytes = max_bytes
        self.passed = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._left_bytes -= len(message.get("body", b""))
        if self._left_bytes < 0:
            self.passed = True
            return {"type": "http.disconnect"}
        return message


class _Answer:
    """Knows whether an answer has begun; holds an application's error answer to a cut-off body back."""

    def __init__(self, send: Send, limit: _BodyLimit) -> None:
        self._send = send
        self._limit = limit
        self.begun = False

    async def send(self, message: Message) -> None:
        if self._limit.passed and not self.begun:
            return
        self.begun = True
        await self._send(message)


def _host_of(origin: str) -> str:
    """The host that an Origin header names; empty if it names none."""
    try:
        return urlsplit(origin).hostname or ""
    except ValueError:
        return ""


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.split("]")[0] + "]"
    return host.rsplit(":", 1)[0]


async def _respond(send: Send, status: int, message: str) -> None:
    body = json.dumps(error_body("refused", message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _refuse_websocket(receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "websocket.close", "code": 1008})


def error_body(kind: str, message: str) -> dict[str, Any]:
    """The one shape of every error answer."""
    return {"error": {"type": kind, "message": message}}


def install_error_handlers(app: FastAPI) -> None:
    """Errors become status codes here and nowhere else."""

    async def on_mars_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, MarsError)
        return JSONResponse(error_body(type(error).__name__, str(error)), status_code=error.http_status)

    async def on_invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return JSONResponse(error_body("InputError", explain_validation(error.errors())), status_code=422)

    async def on_surprise(_: Request, error: Exception) -> Response:
        # The server logs the traceback; what it says is not for whoever asked.
        return JSONResponse(
            error_body("InternalError", f"an unexpected {type(error).__name__}; the log says more"), status_code=500
        )

    app.add_exception_handler(Exception, on_surprise)
    shape_missing_routes(app)
    app.add_exception_handler(MarsError, on_mars_error)
    app.add_exception_handler(RequestValidationError, on_invalid)


def shape_missing_routes(app: FastAPI) -> None:
    """What the framework itself refuses, such as an unknown route or method, is answered in the one shape of errors."""

    async def on_http_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse(error_body("HTTPError", str(error.detail)), status_code=error.status_code, headers=error.headers)

    app.add_exception_handler(HTTPException, on_http_error)


def explain_validation(errors: Any) -> str:
    """Pydantic's errors in one line each: where, what, and what came."""
    parts = []
    for item in errors:
        where = ".".join(str(part) for part in item["loc"])
        came = repr(item.get("input"))
        parts.append(f"{where}: {_said(item)} (got {came if len(came) <= 80 else came[:77] + '...'})")
    return "; ".join(parts)


def _said(item: Mapping[str, Any]) -> str:
    """What is wrong, without pydantic's word for who noticed."""
    if item["type"] == "extra_forbidden":
        return "is no field that is known here; remove it or mend its name"
    return str(item["msg"]).removeprefix("Value error, ")


def add_health(app: FastAPI, ready: Callable[[], str | None], collectors: Sequence[Collector] = ()) -> None:
    """Add /healthz, /readyz and /metrics. `ready` returns None, or why the service is not ready."""
    own = CollectorRegistry()
    for collector in collectors:
        own.register(collector)

    @app.get("/healthz", include_in_schema=False)
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz", include_in_schema=False)
    async def readyz() -> dict[str, str]:
        reason = ready()
        if reason is not None:
            raise NotReadyError(reason)
        return {"status": "ready"}

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(generate_latest() + generate_latest(own), media_type=CONTENT_TYPE_LATEST)


def create_app(
    title: str,
    deployment: Deployment,
    *,
    ready: Callable[[], str | None],
    open_paths: frozenset[str] = frozenset(),
    collectors: Sequence[Collector] = (),
) -> FastAPI:
    """A FastAPI app with the guard, the error handlers, health and metrics.

    Args:
        ready: returns None when the service can serve, else the reason why not.
        open_paths: asked for without the key, besides OPEN_PATHS; from this machine alone if there is no key.
        collectors: of this app's metrics, besides those that its process counts.

    Raises:
        ConfigError: it would serve beyond loopback without a key.
    """
    check_bind(deployment)
    app = FastAPI(title=title)
    app.add_middleware(Guard, deployment=deployment, open_paths=open_paths)
    install_error_handlers(app)
    add_health(app, ready, collectors)
    return app


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: the port is taken or the address is not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(512)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen on {host}:{port} ({reason}); free the port or choose another") from error
    return listener


class _Server(uvicorn.Server):
    """uvicorn that leaves signals to the service, which knows what to finish first."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class HttpServer:
    """Serves an ASGI app on a bound socket in the running event loop."""

    def __init__(self, app: Any, listener: socket.socket) -> None:
        self._listener = listener
        self._server = _Server(
            uvicorn.Config(
                app,
                log_config=None,  # the service's own, so that a failed request is a line like any other
                log_level="warning",
                access_log=False,
                lifespan="on",
                timeout_graceful_shutdown=GRACEFUL_S,
            )
        )
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return once requests are answered."""
        self._task = asyncio.create_task(self._serve(), name="http")
        while not self._server.started:
            if self._task.done():
                self._task.result()
                raise NotReadyError("the HTTP server ended while it started; its log line above says why")
            await asyncio.sleep(0.01)

    async def _serve(self) -> None:
        with suppress(SystemExit):  # uvicorn's way to say that the app could not start
            await self._server.serve(sockets=[self._listener])

    async def stop(self) -> None:
        """Answer what was asked, then close."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task
