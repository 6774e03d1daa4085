"""Publishing goes on beside the training, one version at a time, and what it fails with is not lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mars_shared.contracts import PolicyVersion
from mars_shared.errors import FencedError, WeightsUnavailableError
from mars_shared.weights import WeightsStore
from mars_shared.weights.bits.mirror import Mirror
from mars_shared.weights.source import open_source
from mars_trainer import publication
from mars_trainer.publication import Publications
from mars_trainer.publish import SNAPSHOT_FILE, Publisher, policy_tensors
from test_publish import Tied, expected, holds, make_recipe, version


class Slow:
    """A publisher that encodes when it is let."""

    def __init__(self) -> None:
        self.encoding, self.go = threading.Event(), threading.Event()
        self.announced: list[PolicyVersion] = []
        self.failures: list[Exception] = []
        self.unavailable = 0

    def encode(self, model: object, version: PolicyVersion) -> None:
        self.encoding.set()
        assert self.go.wait(10)
        self.version = version

    def announce(self) -> None:
        if self.failures:
            raise self.failures.pop()
        self.announced.append(self.version)

    def upload(self) -> None:
        if self.unavailable:
            self.unavailable -= 1
            raise WeightsUnavailableError("no answer")

    def needs_snapshot(self) -> bool:
        return True

    def needs_upload(self) -> bool:
        return False

    def mend(self) -> None:
        self.mended = True


async def on_disk(write: Callable[[], object]) -> None:
    await asyncio.to_thread(write)


MODEL = cast(nn.Module, None)


@pytest.fixture
def slow() -> Slow:
    return Slow()


@pytest.fixture
def publications(slow: Slow) -> Publications:
    return Publications(cast(Any, slow), on_disk)


async def test_the_parameters_may_change_once_they_are_encoded_and_no_sooner(publications: Publications, slow: Slow) -> None:
    await publications.begin(MODEL, version(1))
    changing = asyncio.create_task(asyncio.to_thread(publications.until_encoded))
    await asyncio.to_thread(slow.encoding.wait)
    await asyncio.sleep(0.05)
    assert not changing.done()
    slow.go.set()
    await asyncio.wait_for(changing, 10)
    await publications.finished()
    assert slow.announced == [version(1)]


def test_nothing_is_waited_for_where_nothing_is_published(publications: Publications) -> None:
    publications.until_encoded()


async def test_the_next_version_waits_for_the_one_before(publications: Publications, slow: Slow) -> None:
    await publications.begin(MODEL, version(1))
    following = asyncio.create_task(publications.begin(MODEL, version(2)))
    await asyncio.sleep(0.05)
    assert not following.done()
    slow.go.set()
    await following
    interval = await publications.finished()
    assert slow.announced == [version(1), version(2)]
    assert interval is not None and interval[0] <= interval[1]
    assert await publications.finished() is None


async def test_a_failed_publication_is_reported_to_whoever_looks(publications: Publications, slow: Slow) -> None:
    slow.failures.append(FencedError("another trainer has taken over"))
    slow.go.set()
    await publications.begin(MODEL, version(1))
    publications.check()
    with pytest.raises(FencedError):
        while True:
            publications.check()
            await asyncio.sleep(0.01)
    with pytest.raises(FencedError):
        await publications.finished()


async def test_an_encoding_that_fails_keeps_nobody_waiting(publications: Publications, slow: Slow) -> None:
    def broken(model: object, version: PolicyVersion) -> None:
        raise RuntimeError("the graphics card fell off")

    slow.encode = broken  # type: ignore[method-assign]
    await publications.begin(MODEL, version(1))
    await asyncio.wait_for(asyncio.to_thread(publications.until_encoded), 10)
    with pytest.raises(RuntimeError):
        await publications.finished()


async def test_nothing_is_mended_while_a_version_is_on_its_way(publications: Publications, slow: Slow) -> None:
    await publications.begin(MODEL, version(1))
    assert not await publications.mend()
    slow.go.set()
    await publications.finished()
    assert await publications.mend() and slow.mended


async def test_an_upload_is_tried_until_its_place_answers(
    publications: Publications, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publication, "UPLOAD_AGAIN_S", 0.01)
    slow.unavailable = 3
    slow.go.set()
    await publications.begin(MODEL, version(1))
    await publications.finished()
    assert slow.unavailable == 0


async def test_what_is_damaged_at_the_url_alone_is_uploaded_again_without_a_new_version(
    tmp_path: Path, clean_environment: pytest.MonkeyPatch
) -> None:
    url = f"file://{tmp_path / 'remote'}"
    publisher = Publisher(make_recipe(tmp_path, url=url), WeightsStore(tmp_path / "weights"))
    publications, source = Publications(publisher, on_disk), open_source(url, tmp_path)
    await publications.begin(Tied(), version(0))
    await publications.finished()
    head = await source.head()
    assert head is not None
    file = tmp_path / "remote" / head.folder_name / SNAPSHOT_FILE
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    await source.complain(head)
    assert not await publications.mend(), "the store's own snapshot is whole"
    assert file.read_bytes() == whole and await source.manifests() == [head]


async def test_a_mended_snapshot_is_uploaded_once_its_place_answers(
    publications: Publications, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publication, "UPLOAD_AGAIN_S", 0.01)
    slow.unavailable = 2
    assert await publications.mend() and slow.mended
    assert slow.unavailable == 0


async def test_what_the_recipe_s_url_holds_is_what_was_published(tmp_path: Path, clean_environment: pytest.MonkeyPatch) -> None:
    url = f"file://{tmp_path / 'remote'}"
    model, publisher = Tied(), Publisher(make_recipe(tmp_path, url=url), WeightsStore(tmp_path / "weights"))
    publisher.publish(model, version(0))
    model.change(1)
    published = publisher.publish(model, version(1))
    source, mirror = open_source(url, tmp_path), Mirror(tmp_path / "mirror")
    head = await source.head()
    assert head == published
    for manifest in await source.manifests():
        fetched = tmp_path / "fetched" / manifest.folder_name
        fetched.mkdir(parents=True)
        for file in manifest.files:
            await source.fetch(manifest, file, fetched / file.name)
        take = mirror.apply if manifest.base else mirror.take_snapshot
        take(manifest, *([fetched / "delta.mars"] if manifest.base else [[fetched / "model.safetensors"]]))  # type: ignore[operator]
    assert holds(mirror, expected(model, "float32"))
    await source.aclose()


def _gather(rank: int, rendezvous: str, result: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    whole = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    assert any(parameter.to_local().numel() < whole[name].numel() for name, parameter in model.named_parameters())
    gathered = dict(policy_tensors(model, torch.bfloat16))
    if rank == 0:
        equal = all(torch.equal(gathered[name], whole[name].bfloat16()) for name in whole)
        Path(result).write_text(f"{len(gathered)} {equal}")
    dist.destroy_process_group()


def test_shards_are_gathered_one_tensor_after_another(tmp_path: Path) -> None:
    """Two processes, each with half of every parameter."""
    processes.spawn(_gather, args=(str(tmp_path / "rendezvous"), str(tmp_path / "result")), nprocs=2)
    assert (tmp_path / "result").read_text() == "4 True"
