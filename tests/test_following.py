"""How a replica follows what is announced: what goes wrong outside the engine leaves the served version serving."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from mars_rollout import policy as policy_module
from mars_rollout import pull
from mars_rollout.engine.base import BASE_VERSION, BASE_WEIGHTS_ID
from mars_rollout.policy import Policy
from mars_rollout.pull import Puller
from mars_shared.contracts import WeightFile, WeightIdentity, WeightManifest
from mars_shared.errors import WeightsUnavailableError
from mars_shared.weights import model_fingerprint
from mars_shared.weights.partial import Partial
from mirror_builders import Publication, history


class Shelf:
    """A source that has some publications and may be in trouble."""

    def __init__(self, publications: Sequence[Publication]) -> None:
        self.publications = list(publications)
        self.trouble: Exception | None = None
        self.cut = self.slow = False
        self.registered = 0

    async def head(self) -> WeightManifest:
        return self.publications[-1].manifest

    async def manifests(self) -> list[WeightManifest]:
        return [each.manifest for each in self.publications]

    async def register(self, reader: str, weights_id: str | None) -> None:
        self.registered += 1

    async def fetch(self, manifest: WeightManifest, file: WeightFile, target: Path) -> None:
        if self.slow:
            await asyncio.sleep(60)
        if self.trouble is not None:
            raise self.trouble
        (published,) = [each for each in self.publications if each.manifest == manifest]
        (content,) = [path.read_bytes() for path in published.files if path.name == file.name]
        partial = Partial(manifest, file, target)
        if self.cut:
            partial.write(content[: len(content) // 2])
            partial.close()
            raise WeightsUnavailableError("cut off")
        partial.write(content)
        partial.keep()


class Serving:
    """An engine that takes what it is given."""

    def __init__(self) -> None:
        self.version, self.weights_id = BASE_VERSION, BASE_WEIGHTS_ID

    async def update(self, weights: WeightIdentity, files: Sequence[Path]) -> dict[str, float]:
        self.version, self.weights_id = weights.version, weights.weights_id
        return {}


def of_this_model(publication: Publication, folder: Path) -> Publication:
    (folder / "config.json").write_text("{}")
    manifest = publication.manifest.model_copy(update={"model": model_fingerprint(folder)})
    return Publication(manifest, publication.files)


@asynccontextmanager
async def followed(policy: Policy) -> AsyncIterator[None]:
    following = asyncio.create_task(policy.follow())
    try:
        yield
        assert not following.done()
    finally:
        following.cancel()
        await asyncio.wait({following})


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_scratch_folder_without_room_leaves_the_served_version_serving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_module, "COMPLAINT_S", 0.01)
    shelf, engine = Shelf([of_this_model(history(tmp_path, 1).snapshot, tmp_path)]), Serving()
    puller = Puller(cast(Any, shelf), "rollout-0", tmp_path / "scratch", verify="changed")
    policy = Policy(cast(Any, engine), cast(Any, shelf), puller, tmp_path, in_flight="drain")
    shelf.trouble = OSError(errno.ENOSPC, "No space left on device")
    async with followed(policy):
        await until(lambda: policy.damage)
        assert "cannot be kept in the scratch folder" in str(policy.damage) and "set weights.scratch" in str(policy.damage)
        assert engine.weights_id == BASE_WEIGHTS_ID and policy.fault is None
        shelf.trouble = None
        await until(lambda: policy.current)
    assert engine.weights_id == shelf.publications[-1].manifest.weights_id and policy.damage is None


async def test_a_reader_stays_registered_while_a_fetch_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "REGISTER_S", 0.0)
    shelf = Shelf([of_this_model(history(tmp_path, 1).snapshot, tmp_path)])
    puller = Puller(cast(Any, shelf), "rollout-0", tmp_path / "scratch", verify="changed")
    policy = Policy(cast(Any, Serving()), cast(Any, shelf), puller, tmp_path, in_flight="drain")
    shelf.slow = True
    async with followed(policy):
        await until(lambda: shelf.registered >= 3)
        assert not policy.current


async def test_half_of_a_publication_that_is_needed_no_more_is_removed(tmp_path: Path) -> None:
    for name in ("past", "other"):
        (tmp_path / name).mkdir()
    past = history(tmp_path / "past", 2)
    shelf = Shelf([past.snapshot])
    puller = Puller(cast(Any, shelf), "rollout-0", tmp_path / "scratch", verify="changed")
    shelf.cut = True
    with pytest.raises(WeightsUnavailableError):
        async with puller.at(past.weights[0]):
            pass
    fetched = tmp_path / "scratch" / "fetched"
    assert [folder.name for folder in fetched.iterdir()] == [past.snapshot.manifest.folder_name]
    other = history(tmp_path / "other", 0)
    shelf.publications, shelf.cut = [of_version(other.snapshot, 2)], False
    async with puller.at(shelf.publications[0].manifest) as arrival:
        assert arrival.how.startswith("snapshot 1.2")
    assert not list(fetched.iterdir())


def of_version(publication: Publication, step: int) -> Publication:
    version = publication.manifest.version.model_copy(update={"step": step})
    return Publication(publication.manifest.model_copy(update={"version": version}), publication.files)
