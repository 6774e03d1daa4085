"""A copy of the weights store behind an fsspec URL, which the trainer keeps up."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

from mars_shared.contracts import WeightFile, WeightIdentity, WeightManifest
from mars_shared.errors import WeightsMissingError
from mars_shared.weights.partial import Partial, add_ranges, fetch_file, in_thread
from mars_shared.weights.publications import COMPLAINT, FOLDER, HEAD, MANIFEST, in_order, parse_manifest, parse_publication
from mars_shared.weights.readers import Registration, registration_file
from mars_shared.weights.remote import RemoteFolder


class FsspecSource:
    """Reads what the trainer uploads; a `WeightSource`.

    Args:
        url: any of fsspec's, e.g. "s3://bucket/run", "file:///mnt/weights".

    Raises:
        ConfigError: the scheme is unknown or its driver is not installed.
    """

    def __init__(self, url: str) -> None:
        self._remote = RemoteFolder(url)
        self._known: dict[str, WeightManifest] = {}

    async def head(self) -> WeightManifest | None:
        text = await in_thread(self._remote.read, HEAD)
        return None if text is None else parse_manifest(text, where=f"{self._remote.shown_url}/{HEAD}")

    async def manifests(self) -> list[WeightManifest]:
        return await in_thread(self._manifests)

    async def fetch(self, manifest: WeightManifest, file: WeightFile, target: Path) -> None:
        name = f"{manifest.folder_name}/{file.name}"

        async def add(partial: Partial) -> None:
            size_bytes = await in_thread(self._remote.size_bytes, name)
            if size_bytes is None:
                raise WeightsMissingError(f"{self._remote.shown_url}/{name} is not in the weights store")
            await add_ranges(partial, size_bytes, lambda start, end: self._remote.read_range(name, start, end))

        await fetch_file(manifest, file, target, add)

    async def complain(self, identity: WeightIdentity) -> None:
        await in_thread(self._remote.write, COMPLAINT, identity.weights_id.encode())

    async def register(self, reader: str, weights_id: str | None) -> None:
        registration = Registration(weights_id=weights_id, beat=uuid4().hex)
        await in_thread(self._remote.write, registration_file(reader), registration.model_dump_json().encode())

    async def aclose(self) -> None:
        pass

    def _manifests(self) -> list[WeightManifest]:
        folders = [name for name in self._remote.names() if FOLDER.fullmatch(name)]
        self._known = {name: manifest for name in folders if (manifest := self._known.get(name) or self._read(name))}
        return in_order(self._known.values())

    def _read(self, folder: str) -> WeightManifest | None:
        text = self._remote.read(f"{folder}/{MANIFEST}")
        return parse_publication(text, where=f"{self._remote.shown_url}/{folder}", folder_name=folder)
