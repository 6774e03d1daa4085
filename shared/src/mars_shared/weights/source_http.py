"""The weights store as the trainer serves it over HTTP."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from pydantic import SecretStr, TypeAdapter, ValidationError

from mars_shared.contracts import WeightFile, WeightIdentity, WeightManifest
from mars_shared.errors import (
    ConfigError,
    InputError,
    IntegrityError,
    WeightsMissingError,
    WeightsUnavailableError,
)
from mars_shared.masking import without_credentials
from mars_shared.weights.partial import Partial, fetch_file, in_thread
from mars_shared.weights.publications import parse_manifest
from mars_shared.weights.readers import Registration, registration_file

TIMEOUT_S = 30.0
"""Without a byte, after which a connection counts as broken."""
CONNECT_S = 5.0
BUFFER_BYTES = 2**20
_MANIFESTS = TypeAdapter(list[WeightManifest])
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")


class HttpSource:
    """Asks the trainer's routes under /v1/weights; a `WeightSource`.

    Args:
        url: the trainer's, e.g. "http://trainer:8300".

    Raises:
        ConfigError: it is no URL.
    """

    def __init__(self, url: str, api_key: SecretStr | None) -> None:
        headers = {"Accept-Encoding": "identity"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key.get_secret_value()}"
        try:
            base = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ConfigError(
                f"{without_credentials(url)!r} is no URL of a trainer ({error}); expected http://HOST:PORT"
            ) from error
        if not base.host or base.userinfo:
            raise ConfigError(
                f"{without_credentials(url)!r} is no URL of a trainer; expected http://HOST:PORT, and the key in MARS_API_KEY"
            )
        self._where = f"{base.scheme}://{base.netloc.decode()}{base.path}".rstrip("/")
        self._client = httpx.AsyncClient(
            base_url=f"{str(base).rstrip('/')}/v1/weights/",
            headers=headers,
            timeout=httpx.Timeout(TIMEOUT_S, connect=CONNECT_S),
            trust_env=False,
        )
        self._head: tuple[str, WeightManifest] | None = None

    async def head(self) -> WeightManifest | None:
        known = {} if self._head is None else {"If-None-Match": self._head[0]}
        try:
            response = await self._request("GET", "head", headers=known)
        except WeightsMissingError:
            self._head = None
            return None
        if response.status_code == 304 and self._head is not None:
            return self._head[1]
        head = parse_manifest(response.content, where=f"{self._where}/v1/weights/head")
        self._head = (response.headers.get("ETag", ""), head)
        return head

    async def manifests(self) -> list[WeightManifest]:
        response = await self._request("GET", "manifests")
        try:
            return _MANIFESTS.validate_json(response.content)
        except ValidationError as error:
            raise IntegrityError(f"{response.url}: no list of weight manifests ({error.error_count()} errors)") from error

    async def fetch(self, manifest: WeightManifest, file: WeightFile, target: Path) -> None:
        async def add(partial: Partial) -> None:
            headers = {"Range": f"bytes={partial.size_bytes}-"}
            async with self._answer("GET", f"files/{manifest.folder_name}/{file.name}", headers=headers) as response:
                _agree_on_range(response, partial)
                await _add_body(response, partial)

        await fetch_file(manifest, file, target, add)

    async def complain(self, identity: WeightIdentity) -> None:
        await self._request("POST", "complaints", json=identity.identity.model_dump(mode="json"))

    async def register(self, reader: str, weights_id: str | None) -> None:
        path = registration_file(reader).removesuffix(".json")
        await self._request("PUT", path, json=Registration(weights_id=weights_id).model_dump(mode="json"))

    async def aclose(self) -> None:
        await self._client.aclose()

    async def _request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        async with self._answer(method, path, **arguments) as response:
            await response.aread()
        return response

    @asynccontextmanager
    async def _answer(self, method: str, path: str, **arguments: Any) -> AsyncIterator[httpx.Response]:
        try:
            async with self._client.stream(method, path, **arguments) as response:
                if response.status_code >= 300 and response.status_code != 304:
                    await response.aread()
                    self._refuse(response)
                yield response
        except httpx.TransportError as error:
            raise WeightsUnavailableError(
                f"the trainer at {self._where} does not answer ({type(error).__name__} {error}); is it running?"
            ) from error

    def _refuse(self, response: httpx.Response) -> None:
        kind, message = _error_of(response)
        status, said = response.status_code, f"{response.url} answered {response.status_code}: {message}"
        if status in (401, 403):
            raise ConfigError(f"{said}; give this process the trainer's MARS_API_KEY")
        if status == 404 and kind == WeightsMissingError.__name__:
            raise WeightsMissingError(said)
        if status == 416:
            raise IntegrityError(f"{said}; the file is shorter than its manifest says")
        if status == 422:
            raise InputError(said)
        if status >= 500 or status in (408, 429):
            raise WeightsUnavailableError(said)
        raise ConfigError(f"{said}; no trainer serves weights at {self._where}: check the URL")


def _error_of(response: httpx.Response) -> tuple[str, str]:
    try:
        error = response.json()["error"]
        return str(error["type"]), str(error["message"])
    except (ValueError, KeyError, TypeError):
        return "", response.text[:200]


def _agree_on_range(response: httpx.Response, partial: Partial) -> None:
    """See to it that the answer's body begins where the partial ends."""
    if response.status_code == 200:
        partial.restart()  # whoever stands between does not know ranges
        return
    said = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if response.status_code != 206 or said is None or int(said[1]) != partial.size_bytes:
        raise WeightsUnavailableError(
            f"{response.url} answered {response.status_code} with the range {response.headers.get('Content-Range')!r}; "
            f"expected 206 and bytes from {partial.size_bytes} on"
        )
    partial.expect_size(int(said[2]))


async def _add_body(response: httpx.Response, partial: Partial) -> None:
    buffer = bytearray()
    try:
        async for piece in response.aiter_raw():
            buffer += piece
            if len(buffer) >= BUFFER_BYTES:
                full, buffer = buffer, bytearray()
                await in_thread(partial.write, full)
    finally:
        if buffer:
            partial.write(buffer)  # what came before the connection broke need not come again
