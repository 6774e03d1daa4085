"""What every HTTP service refuses, and that a refusal never ends the service. Real sockets, real uvicorn."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
from fastapi import FastAPI, Request
from pydantic import AfterValidator, BaseModel, ConfigDict

from builders import image_bytes
from mars_shared.client import get_json, request_rollouts
from mars_shared.errors import BlobMissingError, ConfigError, InputError, MarsError, MediaTypeError, NotReadyError
from mars_shared.http import HttpServer, bind, check_bind, create_app, is_loopback
from mars_shared.settings import Deployment

pytestmark = pytest.mark.usefixtures("clean_environment")

KEY = "s3cret"
LOOPBACK = Deployment()
LOCKED = Deployment.model_validate({"api_key": KEY})
BEARER = {"Authorization": f"Bearer {KEY}"}


def refuse_odd(parity: str) -> str:
    if parity == "odd":
        raise ValueError("expected even")
    return parity


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    count: int
    parity: Annotated[str, AfterValidator(refuse_odd)] = "even"


def sample_app(deployment: Deployment = LOOPBACK, *, ready: str | None = None) -> FastAPI:
    app = create_app("test", deployment, ready=lambda: ready)

    @app.post("/count")
    async def count(body: Body) -> dict[str, int]:
        return {"count": body.count}

    @app.post("/size")
    async def size(request: Request) -> dict[str, int]:
        return {"bytes": len(await request.body())}

    @app.get("/fails/{kind}")
    async def fails(kind: str) -> None:
        raise {"input": InputError, "media": MediaTypeError, "missing": BlobMissingError, "mars": MarsError, "bug": TypeError}[
            kind
        ](f"{kind} it is")

    return app


@asynccontextmanager
async def serving(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    """The app behind real uvicorn on a free port."""
    listener = bind("127.0.0.1", 0)
    server = HttpServer(app, listener)
    port = listener.getsockname()[1]
    await server.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            yield client
    finally:
        await server.stop()


def error_of(response: httpx.Response) -> str:
    """The message of an error answer, whose shape is always the same."""
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"type", "message"}
    return str(body["error"]["message"])


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1", "::1", "[::1]"])
def test_loopback_is_recognised(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["", "0.0.0.0", "::", "10.0.0.1", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example"]
)
def test_other_hosts_are_not_loopback(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_without_a_key_nothing_serves_beyond_loopback(host: str) -> None:
    with pytest.raises(ConfigError, match=f"MARS_HOST={host}.*set MARS_API_KEY"):
        create_app("test", Deployment(host=host), ready=lambda: None)
    check_bind(Deployment.model_validate({"host": host, "api_key": KEY}))


def test_an_empty_key_does_not_open_a_service_to_the_world() -> None:
    with pytest.raises(ConfigError, match="MARS_API_KEY"):
        check_bind(Deployment.model_validate({"host": "0.0.0.0", "api_key": ""}))


async def test_with_a_key_every_route_but_health_asks_for_it() -> None:
    async with serving(sample_app(LOCKED)) as client:
        for path in ("/healthz", "/readyz"):
            assert (await client.get(path)).status_code == 200
        for path in ("/metrics", "/docs", "/openapi.json", "/count", "/nowhere", "/healthz/", "//healthz", "/healthz/../metrics"):
            response = await client.get(path)
            assert response.status_code == 401, path
            assert "Authorization: Bearer" in error_of(response) and response.headers["www-authenticate"] == "Bearer"
        assert (await client.get("/metrics", headers=BEARER)).status_code == 200
        assert (await client.post("/count", json={"count": 2}, headers=BEARER)).json() == {"count": 2}


@pytest.mark.parametrize(
    "value", ["Bearer wrong", "Bearer s3cret ", "bearer", KEY, "Basic s3cret", "Bearer s3cre", "Bearer s3cret2", "Bearer \xe9"]
)
async def test_a_wrong_key_is_refused(value: str) -> None:
    transport = httpx.ASGITransport(app=sample_app(LOCKED))
    async with httpx.AsyncClient(transport=transport, base_url="http://10.0.0.1") as client:
        response = await client.get("/metrics", headers=[(b"Authorization", value.encode("latin-1"))])
    assert response.status_code == 401 and KEY not in response.text


async def test_an_unexpected_error_has_the_shape_of_all_errors_and_tells_no_inside() -> None:
    async with serving(sample_app()) as client:
        response = await client.get("/fails/bug")
        assert response.status_code == 500
        assert error_of(response) == "an unexpected TypeError; the log says more"


async def test_without_a_key_the_host_header_must_name_loopback() -> None:
    async with serving(sample_app()) as client:
        for host in ("127.0.0.1", "127.0.0.1:8100", "localhost", "localhost:1", "[::1]:8100", "[::1]"):
            assert (await client.get("/metrics", headers={"Host": host})).status_code == 200, host
        for host in ("evil.example", "evil.example:8100", "127.0.0.1.evil.example", "localhost.evil.example:80", "10.0.0.1"):
            response = await client.get("/metrics", headers={"Host": host})
            assert response.status_code == 403 and host in error_of(response)
        assert (await client.get("/healthz", headers={"Host": "evil.example"})).status_code == 200


async def test_without_a_key_a_web_page_from_elsewhere_is_refused() -> None:
    async with serving(sample_app()) as client:
        for origin in ("http://127.0.0.1:3000", "http://localhost", "https://[::1]:8443"):
            assert (await client.get("/metrics", headers={"Origin": origin})).status_code == 200, origin
        for origin in ("http://evil.example", "http://127.0.0.1.evil.example", "null", "", "http://[bad", "localhost"):
            response = await client.get("/metrics", headers={"Origin": origin})
            assert response.status_code == 403 and "origin" in error_of(response), origin


async def test_a_body_over_the_limit_is_refused_before_it_is_read() -> None:
    limit = 2**20
    async with serving(sample_app(Deployment(max_body_mib=1))) as client:
        assert (await client.post("/size", content=b"x" * limit)).json() == {"bytes": limit}
        response = await client.post("/size", content=b"x" * (limit + 1))
        assert response.status_code == 413
        assert error_of(response) == f"request body has {limit + 1} bytes; expected at most {limit}"
        assert (await client.get("/healthz")).status_code == 200


@pytest.mark.parametrize("path", ["/size", "/count"])
async def test_a_body_of_undeclared_length_over_the_limit_is_cut_off_with_413(path: str) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(17):  # one chunk more than the limit
            yield b"x" * 2**16

    async with serving(sample_app(Deployment(max_body_mib=1))) as client:
        response = await client.post(path, content=chunks(), headers={"Content-Type": "application/json"})
        assert response.status_code == 413
        assert str(2**20) in error_of(response)
        assert (await client.get("/healthz")).status_code == 200


async def test_a_content_length_that_is_no_number_is_refused() -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body must not be read")

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-length", b"-1")]
    scope = {"type": "http", "method": "POST", "path": "/size", "headers": headers, "query_string": b""}
    await sample_app()(scope, receive, send)
    assert sent[0]["status"] == 400 and b"Content-Length" in sent[1]["body"]


async def test_errors_become_the_status_codes_of_their_classes() -> None:
    async with serving(sample_app()) as client:
        for kind, status in {"input": 422, "media": 415, "missing": 404, "mars": 500}.items():
            response = await client.get(f"/fails/{kind}")
            assert response.status_code == status and error_of(response) == f"{kind} it is"
        assert response.json()["error"]["type"] == "MarsError"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"count": "many"}', "body.count"),
        (b"{}", "body.count: Field required"),
        (b'{"count": 1, "cuont": 1}', "body.cuont: is no field that is known here; remove it or mend its name (got 1)"),
        (b'{"count": 1, "parity": "odd"}', "body.parity: expected even (got 'odd')"),
        (b"{", "body"),
        (b'{"count": NaN}', "body"),
    ],
)
async def test_an_invalid_body_is_answered_with_where_and_what(content: bytes, message: str) -> None:
    async with serving(sample_app()) as client:
        response = await client.post("/count", content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == 422 and message in error_of(response)


async def test_a_long_wrong_value_is_not_echoed_in_full() -> None:
    async with serving(sample_app()) as client:
        response = await client.post("/count", json={"count": "x" * 10**5})
        assert response.status_code == 422 and len(response.text) < 500


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [("GET", "/nowhere", b"", 404), ("GET", "/count", b"", 405), ("POST", "/count", b"\xff", 400)],
)
async def test_what_the_framework_refuses_has_the_one_shape_of_errors_too(
    method: str, path: str, content: bytes, status: int
) -> None:
    async with serving(sample_app()) as client:
        response = await client.request(method, path, content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == status
        error_of(response)


async def test_a_service_that_is_not_ready_says_why_and_is_alive() -> None:
    async with serving(sample_app(ready="pulling version 1.7")) as client:
        response = await client.get("/readyz")
        assert response.status_code == 503 and error_of(response) == "pulling version 1.7"
        assert (await client.get("/healthz")).json() == {"status": "alive"}


async def test_metrics_are_in_the_format_of_prometheus() -> None:
    async with serving(sample_app()) as client:
        response = await client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain") and "# TYPE" in response.text


async def test_websockets_are_refused() -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await sample_app()({"type": "websocket", "path": "/docs", "headers": []}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def test_a_taken_port_is_an_error_that_names_it(taken_port: int) -> None:
    with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1:{taken_port} \(Address already in use\); free the port"):
        bind("127.0.0.1", taken_port)


@pytest.mark.parametrize(
    ("host", "port"), [("192.0.2.1", 0), ("no-such-host.invalid", 0), ("127.0.0.1", 65700), ("127.0.0.1", -1)]
)
def test_an_address_that_cannot_be_ours_is_an_error_that_names_it(host: str, port: int) -> None:
    with pytest.raises(ConfigError, match=f"cannot listen on {host}:{port}"):
        bind(host, port)


async def test_a_port_is_free_again_once_its_server_stopped() -> None:
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    server = HttpServer(sample_app(), listener)
    await server.start()
    await server.stop()
    bind("127.0.0.1", port).close()


async def test_a_server_whose_app_fails_at_start_is_an_error_and_not_a_wait() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no"})

    with pytest.raises(NotReadyError, match="ended while it started"):
        await HttpServer(broken, bind("127.0.0.1", 0)).start()


async def test_stopping_answers_what_was_asked() -> None:
    app, asked, answer = sample_app(), asyncio.Event(), asyncio.Event()

    @app.get("/slow")
    async def slow() -> str:
        asked.set()
        await answer.wait()
        return "done"

    listener = bind("127.0.0.1", 0)
    server = HttpServer(app, listener)
    await server.start()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", trust_env=False) as client:
        request = asyncio.create_task(client.get("/slow"))
        await asked.wait()
        stopping = asyncio.create_task(server.stop())
        await asyncio.sleep(0)
        answer.set()
        assert (await request).json() == "done"
        await stopping


async def ask(function: Any, *arguments: Any, **options: Any) -> Any:
    return await asyncio.to_thread(function, *arguments, **options)


async def test_the_client_turns_answers_back_into_errors() -> None:
    async with serving(sample_app(LOCKED)) as client:
        url = str(client.base_url).rstrip("/")
        assert await ask(get_json, f"{url}/readyz", LOOPBACK) == {"status": "ready"}
        with pytest.raises(InputError, match=r"answered 401: expected the header"):
            await ask(get_json, f"{url}/fails/mars", LOOPBACK)
        with pytest.raises(MarsError, match=r"answered 500: mars it is"):
            await ask(get_json, f"{url}/fails/mars", LOCKED)
        with pytest.raises(MarsError, match=f"{url}/metrics"):
            await ask(get_json, f"{url}/metrics", LOCKED)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://[bad", "nonsense", "ftp://127.0.0.1"])
def test_an_address_where_nothing_answers_is_named(url: str) -> None:
    with pytest.raises(ConfigError, match="does not answer") as caught:
        get_json(url, LOOPBACK)
    assert url in str(caught.value)


def test_the_client_names_an_image_it_cannot_send(tmp_path: Path) -> None:
    text, whole = tmp_path / "a.png", tmp_path / "b.png"
    text.write_bytes(b"no image")
    whole.write_bytes(image_bytes())

    def send(path: Path) -> None:
        request_rollouts("http://127.0.0.1:9", LOOPBACK, question="?", images=[("visible", path)], truth=None, options={})

    with pytest.raises(InputError, match=r"image 'visible': .*nowhere.png cannot be read \(No such file or directory\)"):
        send(tmp_path / "nowhere.png")
    with pytest.raises(MediaTypeError, match=r"image 'visible' .*a.png.*expected PNG, JPEG or WebP"):
        send(text)
    with pytest.raises(ConfigError, match="does not answer"):
        send(whole)
