"""Weights over connections that break, the trainer's routes, and an fsspec driver that fails. Real sockets, real uvicorn."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import fsspec
import httpx
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pydantic import SecretStr

from cutting_proxy import cutting_proxy
from mars_shared.contracts import WeightManifest
from mars_shared.errors import ConfigError, IntegrityError, WeightsMissingError, WeightsUnavailableError
from mars_shared.http import HttpServer, bind
from mars_shared.weights import WeightsStore, open_source
from mars_shared.weights.partial import TRIES
from mars_shared.weights.source_http import HttpSource
from mars_trainer.upload import Uploader
from test_weight_sources import CONTENT, impatient, partial_of, store, trainer_port
from weights_builders import SNAPSHOT_FILE, publish_snapshot, weights

__all__ = ["impatient", "store", "trainer_port"]
KEY = SecretStr("key")


@pytest.fixture
def manifest(store: WeightsStore) -> WeightManifest:
    return publish_snapshot(store, weights(0, content=CONTENT), CONTENT)


def ranges(requests: list[str]) -> list[str]:
    return [line.partition(": ")[2] for head in requests for line in head.split("\r\n") if line.lower().startswith("range")]


async def test_a_connection_that_breaks_is_gone_on_with_where_it_broke(
    manifest: WeightManifest, trainer_port: int, tmp_path: Path
) -> None:
    async with cutting_proxy(trainer_port, [3_000_000, 1, None]) as proxy:
        source = HttpSource(f"http://127.0.0.1:{proxy.port}", KEY)
        await source.fetch(manifest, manifest.files[0], tmp_path / "mine")
        await source.aclose()
    assert (tmp_path / "mine").read_bytes() == CONTENT
    assert ranges(proxy.requests) == ["bytes=0-", "bytes=3000000-", "bytes=3000001-"]
    assert proxy.bodies_bytes == [3_000_000, 1, len(CONTENT) - 3_000_001]


async def test_a_source_that_brings_nothing_is_given_up_and_gone_on_with_later(
    manifest: WeightManifest, trainer_port: int, tmp_path: Path
) -> None:
    file = manifest.files[0]
    async with cutting_proxy(trainer_port, [5_000_000, 0]) as proxy:
        source = HttpSource(f"http://127.0.0.1:{proxy.port}", KEY)
        with pytest.raises(WeightsUnavailableError, match=f"the trainer at http://127.0.0.1:{proxy.port} does not answer"):
            await source.fetch(manifest, file, tmp_path / "mine")
        await source.aclose()
    assert proxy.bodies_bytes == [5_000_000] + [0] * TRIES
    assert partial_of(tmp_path / "mine", file).read_bytes() == CONTENT[:5_000_000]
    async with cutting_proxy(trainer_port, [None]) as proxy:
        source = HttpSource(f"http://127.0.0.1:{proxy.port}", KEY)
        await source.fetch(manifest, file, tmp_path / "mine")
        await source.aclose()
    assert ranges(proxy.requests) == ["bytes=5000000-"]
    assert (tmp_path / "mine").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [(206, {"Content-Range": "bytes 0-{last}/{size}"}, b""), (200, {}, CONTENT[:1000])],
    ids=["a range without bytes", "a part as the whole"],
)
async def test_answers_that_end_early_without_saying_so_are_given_up(
    manifest: WeightManifest, tmp_path: Path, status: int, headers: dict[str, str], body: bytes
) -> None:
    """Some proxies do that; nothing has a length, so that nothing is missed by the connection."""
    asked: list[httpx.Request] = []

    async def pieces() -> AsyncIterator[bytes]:
        yield body

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        said = {name: text.format(last=len(CONTENT) - 1, size=len(CONTENT)) for name, text in headers.items()}
        return httpx.Response(status, headers=said, content=pieces())

    source = HttpSource("http://trainer:8300", KEY)
    source._client = httpx.AsyncClient(base_url="http://trainer:8300/v1/weights/", transport=httpx.MockTransport(answer))
    with pytest.raises(WeightsUnavailableError, match=f"the answer ended after {len(body)} bytes"):
        await source.fetch(manifest, manifest.files[0], tmp_path / "mine")
    assert len(asked) == TRIES + bool(body)
    await source.aclose()


async def test_nobody_listening_is_unavailable(manifest: WeightManifest, tmp_path: Path) -> None:
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    listener.close()
    source = HttpSource(f"http://127.0.0.1:{port}", KEY)
    for asked in (source.head, source.manifests, lambda: source.complain(manifest), lambda: source.register("a", None)):
        with pytest.raises(WeightsUnavailableError, match=f"127.0.0.1:{port} does not answer .*is it running"):
            await asked()
    await source.aclose()


@pytest.mark.parametrize("key", [None, SecretStr("wrong")])
async def test_without_the_right_key_nothing_is_read_and_the_error_says_why(
    manifest: WeightManifest, trainer_port: int, tmp_path: Path, key: SecretStr | None
) -> None:
    source = HttpSource(f"http://127.0.0.1:{trainer_port}", key)
    with pytest.raises(ConfigError, match="401.*give this process the trainer's MARS_API_KEY"):
        await source.head()
    with pytest.raises(ConfigError, match="401"):
        await source.fetch(manifest, manifest.files[0], tmp_path / "mine")
    await source.aclose()
    assert not (tmp_path / "mine").exists()


async def test_a_url_where_no_weights_are_served_is_not_taken_for_a_trainer_that_has_none_yet(trainer_port: int) -> None:
    source = HttpSource(f"http://127.0.0.1:{trainer_port}/elsewhere", KEY)
    with pytest.raises(ConfigError, match="404.*no trainer serves weights at .*/elsewhere: check the URL"):
        await source.head()
    await source.aclose()


async def test_polling_a_head_that_has_not_changed_carries_no_body(
    manifest: WeightManifest, store: WeightsStore, trainer_port: int
) -> None:
    async with cutting_proxy(trainer_port, [None]) as proxy:
        source = HttpSource(f"http://127.0.0.1:{proxy.port}", KEY)
        assert [await source.head() for _ in range(3)] == [manifest] * 3
        assert proxy.bodies_bytes == [len(manifest.model_dump_json())], "one connection, one body"
        other = publish_snapshot(store, weights(1))
        assert await source.head() == other
        await source.aclose()
    size = len(manifest.model_dump_json()) + len(other.model_dump_json())
    assert proxy.bodies_bytes == [size]


@pytest.mark.parametrize(
    "path",
    [
        "files/{folder}/..%2F..%2Fsecret",
        "files/{folder}%2F..%2F..%2Fsecret/x",
        "files/..%2Fsecret/x",
        "files/../secret",
        "files/{folder}/../../../secret",
        "files/{folder}/.hidden",
        "files/{folder}/%00",
        "files/readers/rollout-0.json",
        "files/{folder}",
        "files/.staged-0/model.safetensors",
    ],
)
async def test_nothing_but_files_of_publications_is_served(
    manifest: WeightManifest, store: WeightsStore, trainer_port: int, tmp_path: Path, path: str
) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (store.folder(manifest) / ".hidden").write_bytes(b"secret")
    store.register("rollout-0", None)
    headers = {"Authorization": "Bearer key"}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{trainer_port}", headers=headers, trust_env=False) as client:
        good = await client.get(f"/v1/weights/files/{manifest.folder_name}/{SNAPSHOT_FILE}")
        assert good.content == CONTENT
        answer = await client.get(f"/v1/weights/{path.format(folder=manifest.folder_name)}")
    assert answer.status_code in (404, 422) and b"secret" not in answer.content.replace(b"/secret", b"")


async def test_the_routes_refuse_readers_and_complaints_that_are_none(
    manifest: WeightManifest, store: WeightsStore, trainer_port: int
) -> None:
    headers = {"Authorization": "Bearer key"}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{trainer_port}/v1/weights", headers=headers) as client:
        assert (await client.put("/readers/.hidden", json={"weights_id": None})).status_code == 422
        assert (await client.put("/readers/a", json={"weights_id": "no hash"})).status_code == 422
        assert (await client.put("/readers/a", json={})).status_code == 422
        assert (await client.post("/complaints", json={"weights_id": manifest.weights_id})).status_code == 422
        missing = await client.get(f"/files/{manifest.folder_name}/other")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "WeightsMissingError")
    assert not store.needs_snapshot()


async def test_a_server_that_knows_no_ranges_sends_all_again(manifest: WeightManifest, tmp_path: Path) -> None:
    async def whole(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            length = str(len(CONTENT)).encode()
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
            await send({"type": "http.response.body", "body": CONTENT})

    listener = bind("127.0.0.1", 0)
    server = HttpServer(whole, listener)
    server._server.config.lifespan = "off"
    await server.start()
    partial_of(tmp_path / "mine", manifest.files[0]).write_bytes(CONTENT[:100])
    source = HttpSource(f"http://127.0.0.1:{listener.getsockname()[1]}", KEY)
    await source.fetch(manifest, manifest.files[0], tmp_path / "mine")
    await source.aclose()
    await server.stop()
    assert (tmp_path / "mine").read_bytes() == CONTENT


async def test_a_publication_that_was_removed_since_it_was_listed_is_missing(
    manifest: WeightManifest, store: WeightsStore, trainer_port: int, tmp_path: Path
) -> None:
    source = HttpSource(f"http://127.0.0.1:{trainer_port}", KEY)
    publish_snapshot(store, weights(1))
    store.prune(keep_snapshots=1)
    with pytest.raises(WeightsMissingError, match=r"404: .*it may have been removed since it was listed"):
        await source.fetch(manifest, manifest.files[0], tmp_path / "mine")
    await source.aclose()


class Flaky(MemoryFileSystem):
    """A store whose driver raises errors of its own while `failures` last."""

    protocol = "flaky"
    failures: int = 0
    reads: list[tuple[int, int]] = []  # noqa: RUF012  # one list for all instances, as the store of its parent

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        if start is not None and end is not None:
            if type(self).failures and self.reads:
                type(self).failures -= 1
                raise RuntimeError("the driver's own")
            self.reads.append((start, end))
        return super().cat_file(path, start, end, **options)


@pytest.fixture
def flaky_url(manifest: WeightManifest, store: WeightsStore) -> str:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.reads.clear()
    Uploader(store, "flaky://shelf").upload()
    return "flaky://shelf"


async def test_a_driver_that_fails_is_asked_again_for_the_rest(
    manifest: WeightManifest, flaky_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Flaky, "failures", TRIES - 1)
    await open_source(flaky_url, tmp_path).fetch(manifest, manifest.files[0], tmp_path / "mine")
    assert (tmp_path / "mine").read_bytes() == CONTENT
    four = 4 * 2**20
    assert Flaky.reads == [(0, four), (four, 2 * four), (2 * four, len(CONTENT))]


async def test_a_driver_that_goes_on_failing_is_unavailable(
    manifest: WeightManifest, flaky_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Flaky, "failures", 99)
    with pytest.raises(WeightsUnavailableError, match=r"flaky://shelf/.*no answer \(RuntimeError: the driver's own\)"):
        await open_source(flaky_url, tmp_path).fetch(manifest, manifest.files[0], tmp_path / "mine")
    assert partial_of(tmp_path / "mine", manifest.files[0]).stat().st_size == 4 * 2**20


async def test_a_damaged_head_is_an_error_that_names_it(manifest: WeightManifest, flaky_url: str, tmp_path: Path) -> None:
    fs, root = fsspec.core.url_to_fs(flaky_url)
    fs.pipe_file(f"{root}/HEAD", b"{}")
    with pytest.raises(IntegrityError, match="flaky://shelf/HEAD: not a weight manifest"):
        await open_source(flaky_url, tmp_path).head()
