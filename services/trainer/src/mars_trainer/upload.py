"""Keeps a copy of the weights store behind an fsspec URL, for replicas that share neither volume nor network with the trainer."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from pydantic import ValidationError

from mars_shared.contracts import WeightManifest, WeightsKind
from mars_shared.errors import ConfigError, FencedError, InputError, IntegrityError
from mars_shared.weights import COMPLAINT, MANIFEST, READER_S, WeightsStore
from mars_shared.weights.publications import FOLDER, HEAD, parse_manifest
from mars_shared.weights.readers import READERS, Registration
from mars_shared.weights.remote import RemoteFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Uploaded:
    """What one upload changed."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    size_bytes: int


class Uploader:
    """Brings the folder behind a URL to what the store holds, and what readers write there back into the store.

        uploader.collect()        # who reads there, and who complains
        store.prune(keep_snapshots=2)
        uploader.upload()

    Blocks: call it in a thread, one call at a time. All methods raise WeightsUnavailableError when the URL does not answer;
    called again, they go on with what is lacking.

    Raises:
        ConfigError: the URL's scheme is unknown, or its driver is not installed.
    """

    def __init__(self, store: WeightsStore, url: str) -> None:
        self._store = store
        self._remote = RemoteFolder(url)
        self._whole: dict[str, WeightManifest] = {}
        self.lacking = False
        """Whether readers complained of something that the next `upload` brings again."""
        self._beats: dict[str, tuple[bytes, float]] = {}

    def collect(self) -> None:
        """Register the readers of the URL in the store, and pass on their complaint.

        A reader lives while its registration changes; no clock is compared. Publications of weights that somebody
        complained about are uploaded again by the next `upload`.
        """
        for name in self._remote.names(READERS):
            if name.endswith(".json") and not name.startswith("."):
                self._collect_reader(name.removesuffix(".json"))
        complaint = self._remote.read(COMPLAINT)
        if complaint is None:
            return
        for manifest in self._store.manifests():
            if manifest.weights_id.encode() == complaint:
                logger.warning("a reader of %s cannot reach weights %s", self._remote.shown_url, manifest.version)
                self._whole.pop(manifest.folder_name, None)
                self.lacking = True
                self._remote.remove(f"{manifest.folder_name}/{MANIFEST}")
                self._store.complain(manifest)
        self._remote.remove(COMPLAINT)

    def upload(self) -> Uploaded:
        """Add the publications that are lacking, announce HEAD, then remove what the store holds no more; idempotent.

        HEAD is announced as soon as a way to it is there: replicas that follow do not wait for a snapshot. A publication that is damaged in the store is left out, and complained about there.

        Raises:
            ConfigError: the URL holds the weights of another run.
            FencedError: a newer incarnation of the trainer announces its weights there.
        """
        head, manifests = self._store.head(), self._store.manifests()
        if head is None:
            return Uploaded((), (), 0)
        announced = self._announced(head)
        there = {name for name in self._remote.names() if FOLDER.fullmatch(name)}
        added: list[WeightManifest] = []
        for kind in (WeightsKind.DELTA, WeightsKind.SNAPSHOT):
            of_kind = [manifest for manifest in manifests if manifest.kind is kind]
            added += [manifest for manifest in of_kind if not self._is_there(manifest, there) and self._add(manifest)]
            if announced != head and self._can_be_reached(head):
                self._remote.write(HEAD, head.model_dump_json().encode())
                announced = head
        self.lacking = False
        removed = sorted(there - {manifest.folder_name for manifest in manifests})
        for folder in removed:
            self._remote.remove(f"{folder}/{MANIFEST}")  # out of sight first
            self._remote.remove(folder)
        return Uploaded(tuple(m.folder_name for m in manifests if m in added), tuple(removed), sum(m.size_bytes for m in added))

    def _announced(self, head: WeightManifest) -> WeightManifest | None:
        text = self._remote.read(HEAD)
        if text is None:
            return None
        try:
            announced = parse_manifest(text, where=f"{self._remote.shown_url}/{HEAD}")
        except IntegrityError as error:
            logger.error("%s", error)
            return None
        if announced.run != head.run:
            raise ConfigError(
                f"{self._remote.shown_url} holds the weights of run {announced.run!r}, not {head.run!r}; give each run a URL of its own"
            )
        if announced.version.incarnation > head.version.incarnation:
            raise FencedError(
                f"weights {head.version} are not uploaded, since {self._remote.shown_url} announces {announced.version}: "
                "another trainer has taken over; end this one"
            )
        return announced

    def _can_be_reached(self, head: WeightManifest) -> bool:
        """Whether the weights are there, and a snapshot with which newcomers begin."""
        there = self._whole.values()
        return any(m.weights_id == head.weights_id for m in there) and any(m.kind is WeightsKind.SNAPSHOT for m in there)

    def _is_there(self, manifest: WeightManifest, there: set[str]) -> bool:
        name = manifest.folder_name
        if name not in there:
            self._whole.pop(name, None)
        elif name not in self._whole and self._remote.read(f"{name}/{MANIFEST}") == manifest.model_dump_json().encode():
            self._whole[name] = manifest
        return self._whole.get(name) == manifest

    def _add(self, manifest: WeightManifest) -> bool:
        try:
            folder = self._store.verify(manifest)
        except IntegrityError as error:
            if self._store.folder(manifest).exists():  # else it was pruned meanwhile
                logger.error("not uploaded: %s", error)
                self._store.complain(manifest)
            return False
        self._remote.remove(f"{manifest.folder_name}/{MANIFEST}")  # it counts as whole once its manifest is there
        for file in manifest.files:
            self._remote.upload(folder / file.name, f"{manifest.folder_name}/{file.name}")
        self._remote.write(f"{manifest.folder_name}/{MANIFEST}", manifest.model_dump_json().encode())
        self._whole[manifest.folder_name] = manifest
        return True

    def _collect_reader(self, reader: str) -> None:
        name = f"{READERS}/{reader}.json"
        text = self._remote.read(name)
        if text is None:
            return
        known, since_s = self._beats.get(reader, (b"", time.monotonic()))
        if text == known:
            if time.monotonic() - since_s > READER_S:
                self._remote.remove(name)
                del self._beats[reader]
            return
        self._beats[reader] = (text, time.monotonic())
        try:
            self._store.register(reader, Registration.model_validate_json(text).weights_id)
        except (ValidationError, InputError) as error:
            logger.warning("%s/%s is no registration of a reader: %s", self._remote.shown_url, name, error)
