"""Readers of the weights store: the shared volume, a real HTTP server, and fsspec, behave alike."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import fsspec
import numpy as np
import pytest
from fsspec.registry import known_implementations
from pydantic import SecretStr

from mars_shared.contracts import WeightFile, WeightManifest
from mars_shared.errors import ConfigError, InputError, IntegrityError, WeightsMissingError, WeightsUnavailableError
from mars_shared.http import HttpServer, bind
from mars_shared.settings import Deployment
from mars_shared.weights import WeightSource, WeightsStore, open_source
from mars_shared.weights import partial as partial_module
from mars_shared.weights.partial import in_thread
from mars_trainer.app import build_app
from mars_trainer.progress import Progress
from mars_trainer.upload import Uploader
from weights_builders import SNAPSHOT_FILE, publish_delta, publish_snapshot, weights

CONTENT = np.random.default_rng(0).bytes(10 * 2**20 + 17)
"""Several chunks and a rest."""


@dataclass
class Shelf:
    """A trainer's store and a reader's source, with what is between them."""

    store: WeightsStore
    source: WeightSource
    sync: Callable[[], None]
    """What the trainer does after a publication."""
    spoil: Callable[[str, bytes | None], None]
    """Replaces (or removes) a file as the reader sees it."""
    on_volume: bool


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial_module, "FIRST_PAUSE_S", 0.001)


@pytest.fixture
def store(tmp_path: Path) -> WeightsStore:
    return WeightsStore(tmp_path / "store")


@pytest.fixture
async def trainer_port(store: WeightsStore, clean_environment: pytest.MonkeyPatch) -> AsyncIterator[int]:
    """Of a real server with the trainer's app, whose key is "key"."""
    progress = Progress(run="r", steps=1, version=weights(0).version)
    listener = bind("127.0.0.1", 0)
    server = HttpServer(build_app(Deployment(api_key=SecretStr("key")), progress, store), listener)
    await server.start()
    yield listener.getsockname()[1]
    await server.stop()


@pytest.fixture(params=["volume", "http", "file", "memory"])
async def shelf(request: pytest.FixtureRequest, store: WeightsStore, tmp_path: Path, trainer_port: int) -> AsyncIterator[Shelf]:
    urls = {
        "volume": None,
        "http": f"http://127.0.0.1:{trainer_port}",
        "file": f"file://{tmp_path}/remote/run",
        "memory": f"memory://{uuid4().hex}/run",
    }
    url = urls[request.param]
    source = open_source(url, tmp_path / "store", SecretStr("key"))
    remote = request.param in ("file", "memory")
    uploader = Uploader(store, url) if remote and url else None

    def sync() -> None:
        if uploader is not None:
            uploader.collect()
            uploader.upload()

    def spoil(name: str, content: bytes | None) -> None:
        fs, root = fsspec.core.url_to_fs(url if remote else f"file://{tmp_path}/store")
        if content is None:
            fs.rm(f"{root}/{name}")
        else:
            fs.pipe_file(f"{root}/{name}", content)

    yield Shelf(store, source, sync, spoil, on_volume=url is None)
    await source.aclose()


def publish(shelf: Shelf, step: int = 0, content: bytes = CONTENT) -> tuple[WeightManifest, WeightFile, str]:
    """A snapshot, its file, and the file's path in the store."""
    manifest = publish_snapshot(shelf.store, weights(step, content=content), content)
    shelf.sync()
    return manifest, manifest.files[0], f"{manifest.folder_name}/{SNAPSHOT_FILE}"


def partial_of(target: Path, file: WeightFile) -> Path:
    return target.with_name(f".{target.name}.{file.blake3[:16]}.partial")


def partials(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".*.partial"))


async def test_the_head_is_what_the_trainer_announced(shelf: Shelf) -> None:
    assert await shelf.source.head() is None
    assert await shelf.source.manifests() == []
    first = publish(shelf)[0]
    assert await shelf.source.head() == first
    assert await shelf.source.head() == first
    second = publish_delta(shelf.store, weights(1), first)
    shelf.sync()
    assert await shelf.source.head() == second
    assert await shelf.source.manifests() == [first, second]
    publish_snapshot(shelf.store, weights(2))
    shelf.store.prune(keep_snapshots=1)
    shelf.sync()
    assert await shelf.source.manifests() == [await shelf.source.head()] == shelf.store.manifests()


@pytest.mark.parametrize("content", [CONTENT, b"x", b""])
async def test_a_file_is_brought_to_its_target_whole(shelf: Shelf, tmp_path: Path, content: bytes) -> None:
    manifest, file, _ = publish(shelf, content=content)
    await shelf.source.fetch(manifest, file, tmp_path / "mine")
    assert (tmp_path / "mine").read_bytes() == content
    assert partials(tmp_path) == []


@pytest.mark.parametrize("kept", [1, 7 * 2**20, len(CONTENT)])
async def test_what_is_there_already_is_not_read_again(shelf: Shelf, tmp_path: Path, kept: int) -> None:
    manifest, file, name = publish(shelf)
    partial_of(tmp_path / "mine", file).write_bytes(CONTENT[:kept])
    shelf.spoil(name, bytes(kept) + CONTENT[kept:])  # who reads the beginning again gets the wrong bytes
    await shelf.source.fetch(manifest, file, tmp_path / "mine")
    assert (tmp_path / "mine").read_bytes() == CONTENT


@pytest.mark.parametrize(
    "came", [CONTENT[:-1] + b"?", CONTENT[:-1], CONTENT + b"?", b""], ids=["changed", "shorter", "longer", "empty"]
)
async def test_wrong_bytes_are_refused_and_nothing_is_left_of_them(shelf: Shelf, tmp_path: Path, came: bytes) -> None:
    manifest, file, name = publish(shelf)
    (tmp_path / "mine").write_bytes(b"before")
    shelf.spoil(name, came)
    with pytest.raises(IntegrityError, match=f"{name}|416"):
        await shelf.source.fetch(manifest, file, tmp_path / "mine")
    assert (tmp_path / "mine").read_bytes() == b"before"
    shelf.spoil(name, CONTENT)
    await shelf.source.fetch(manifest, file, tmp_path / "mine")
    assert (tmp_path / "mine").read_bytes() == CONTENT


@pytest.mark.parametrize("left", [b"\0" * 5, CONTENT + b"more"], ids=["wrong", "longer"])
async def test_a_partial_that_cannot_be_gone_on_with_does_no_harm(shelf: Shelf, tmp_path: Path, left: bytes) -> None:
    manifest, file, _ = publish(shelf)
    partial_of(tmp_path / "mine", file).write_bytes(left)
    if len(left) == 5:
        with pytest.raises(IntegrityError, match=SNAPSHOT_FILE):
            await shelf.source.fetch(manifest, file, tmp_path / "mine")
    await shelf.source.fetch(manifest, file, tmp_path / "mine")
    assert (tmp_path / "mine").read_bytes() == CONTENT


async def test_what_is_left_of_other_weights_for_the_same_target_is_removed(shelf: Shelf, tmp_path: Path) -> None:
    manifest, file, _ = publish(shelf)
    (tmp_path / f".mine.{'0' * 16}.partial").write_bytes(b"old")
    (tmp_path / f".mine2.{'0' * 16}.partial").write_bytes(b"another target's")
    await shelf.source.fetch(manifest, file, tmp_path / "mine")
    assert partials(tmp_path) == [f".mine2.{'0' * 16}.partial"]


async def test_a_file_that_is_gone_is_missing_and_not_unavailable(shelf: Shelf, tmp_path: Path) -> None:
    manifest, file, name = publish(shelf)
    shelf.spoil(name, None)
    with pytest.raises(WeightsMissingError, match=name):
        await shelf.source.fetch(manifest, file, tmp_path / "mine")


async def test_a_damaged_publication_is_not_listed(shelf: Shelf) -> None:
    manifest = publish(shelf)[0]
    shelf.spoil(f"{manifest.folder_name}/manifest.json", b"{}")
    assert await shelf.source.manifests() == []


async def test_a_complaint_reaches_the_trainer(shelf: Shelf) -> None:
    base = publish(shelf)[0]
    head = publish_delta(shelf.store, weights(1), base)
    shelf.sync()
    await shelf.source.complain(head)
    shelf.sync()
    assert shelf.store.needs_snapshot()
    publish_snapshot(shelf.store, weights(1), announce=False)
    shelf.sync()
    assert not shelf.store.needs_snapshot()
    assert [manifest.kind for manifest in await shelf.source.manifests()] == ["snapshot", "delta", "snapshot"]


async def test_what_a_registered_reader_needs_is_kept_for_it(shelf: Shelf) -> None:
    base = publish(shelf)[0]
    for step in (1, 2, 3):
        base = publish_delta(shelf.store, weights(step, content=bytes([step])), base)
    publish_snapshot(shelf.store, base, CONTENT, announce=False)
    await shelf.source.register("rollout-0", weights(1, content=bytes([1])).weights_id)
    await shelf.source.register("rollout-1", None)
    shelf.sync()
    shelf.store.prune(keep_snapshots=1)
    shelf.sync()
    assert [str(manifest.version) for manifest in await shelf.source.manifests()] == ["1.2", "1.3", "1.3"]
    with pytest.raises(InputError, match=r"reader '\.\./HEAD'"):
        await shelf.source.register("../HEAD", None)


async def test_a_disk_that_is_full_is_not_taken_for_a_source_that_does_not_answer(shelf: Shelf, tmp_path: Path) -> None:
    manifest, file, _ = publish(shelf)
    partial_of(tmp_path / "mine", file).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        await shelf.source.fetch(manifest, file, tmp_path / "mine")


async def test_a_cancelled_read_leaves_no_thread_at_work() -> None:
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        may_end.wait()
        ended.set()

    task = asyncio.create_task(in_thread(work))
    await asyncio.to_thread(begun.wait)
    task.cancel()
    await asyncio.sleep(0.01)
    assert not task.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


@pytest.mark.parametrize("url", ["", "trainer:8300", "://x", "http://", "http://user:secret@trainer:8300", "nosuch://x"])
def test_what_is_no_url_of_a_store_is_refused_and_shows_no_password(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError) as refused:
        open_source(url, tmp_path)
    assert "secret" not in str(refused.value)


def test_a_scheme_whose_driver_is_not_installed_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(known_implementations, "s9", {"class": "s9fs.S9", "err": "Install s9fs to access S9"})
    with pytest.raises(ConfigError, match=r"s9://\*\*\*@bucket/run\?\*\*\* cannot be used.*Install s9fs"):
        open_source("s9://user:secret@bucket/run?sig=secret", tmp_path)


def test_a_bare_install_says_what_fsspec_urls_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ConfigError, match=r"s3://bucket/run needs the package fsspec; install mars-shared\[weights\]"):
        open_source("s3://bucket/run", tmp_path)


async def test_a_volume_that_fails_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WeightsUnavailableError, match="file/weights cannot be used.*is the volume there"):
        await open_source(None, tmp_path / "file" / "weights").head()
