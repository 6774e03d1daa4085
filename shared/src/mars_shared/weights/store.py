"""The weights store: immutable, verified publications, and a HEAD file that announces the newest version.

    root/
      HEAD                      manifest of the announced version (JSON, replaced atomically)
      1.7-3f9c...-delta/        one folder per publication: files and manifest.json
      readers/rollout-0.json    who reads, and which weights it serves
      complaint                 id of the announced weights, if a reader could not reach them

The trainer publishes; replicas pull when HEAD changes. Nothing here knows what a tensor is.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from uuid import uuid4

from mars_shared.contracts import PolicyVersion, WeightIdentity, WeightManifest, WeightsKind
from mars_shared.errors import FencedError, IntegrityError, WeightsMissingError
from mars_shared.faults import fault
from mars_shared.files import fsync_path, write_atomic
from mars_shared.weights.publications import (
    COMPLAINT,
    HEAD,
    MANIFEST,
    describe_file,
    in_order,
    parse_manifest,
    parse_publication,
)
from mars_shared.weights.readers import Readers
from mars_shared.weights.retention import still_needed

logger = logging.getLogger(__name__)


class WeightsStore:
    """A folder that the trainer writes and any number of replicas read."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._readers = Readers(root)
        root.mkdir(parents=True, exist_ok=True)

    def sweep(self) -> None:
        """Remove what publications and removals that were cut off left; for the store's one writer, while it stages nothing."""
        for folder in self.root.glob(".staged-*"):
            shutil.rmtree(folder)

    def head(self) -> WeightManifest | None:
        """A manifest of the announced version; None before the first.

        Raises:
            IntegrityError: HEAD is not a manifest.
        """
        text = _read(self.root / HEAD)
        return None if text is None else parse_manifest(text, where=str(self.root / HEAD))

    def head_to_replace(self) -> WeightManifest | None:
        """HEAD for its writer: one that cannot be read is as good as none."""
        try:
            return self.head()
        except IntegrityError as error:
            logger.error("%s", error)
            return None

    def manifests(self) -> list[WeightManifest]:
        """Of all whole publications, `in_order`.

        A folder whose manifest is missing or unreadable is left out, and the log says so.
        """
        found = (self._manifest(path) for path in self._publications())
        return in_order(m for m in found if m is not None)

    def folder(self, manifest: WeightManifest) -> Path:
        """Where a publication's files are, verified or not."""
        return self.root / manifest.folder_name

    def verify(self, manifest: WeightManifest) -> Path:
        """The publication's folder, after every file was checked against the manifest.

        Raises:
            WeightsMissingError: a file is missing.
            IntegrityError: a file's size or hash differs.
        """
        folder = self.folder(manifest)
        for expected in manifest.files:
            path = folder / expected.name
            try:
                actual = describe_file(path)
            except FileNotFoundError as error:
                raise WeightsMissingError(f"weights {manifest.version}: {path} is missing") from error
            if actual != expected:
                raise IntegrityError(
                    f"weights {manifest.version}: {path} has {actual.size_bytes} bytes and hash {actual.blake3}; "
                    f"expected {expected.size_bytes} and {expected.blake3}"
                )
        return folder

    def stage(self) -> Path:
        """An empty folder inside the store, to write a publication's files into before `publish`."""
        folder = self.root / f".staged-{uuid4().hex}"
        folder.mkdir()
        return folder

    def publish(
        self,
        staged: Path,
        *,
        identity: WeightIdentity,
        kind: WeightsKind,
        base: WeightIdentity | None = None,
        invertible: bool = False,
        announce: bool = True,
    ) -> WeightManifest:
        """Make a staged folder an immutable publication and announce it, durably and in that order.

        Where the same publication stands whole already, that one stays and the staged folder is removed.

        Args:
            base: of a delta, the weights that it changes.
            invertible: of a delta, whether it leads back to its base too.
            announce: False leaves HEAD alone: one more way to a version, such as a snapshot after its delta.

        Returns:
            What stands in the store.

        Raises:
            FencedError: HEAD is of a newer incarnation; the staged folder is removed.
        """
        files = sorted(staged.iterdir())
        for file in files:
            fsync_path(file)
        manifest = WeightManifest(
            **dict(identity.identity),
            kind=kind,
            base=None if base is None else base.identity,
            invertible=invertible,
            files=tuple(describe_file(file) for file in files),
        )
        write_atomic(staged / MANIFEST, manifest.model_dump_json().encode())
        self._refuse_older_incarnation(staged, identity.version)
        manifest = self._place(staged, manifest)
        if announce:
            fault("trainer.before_announce")
            write_atomic(self.root / HEAD, manifest.model_dump_json().encode())
        return manifest

    def complain(self, identity: WeightIdentity) -> None:
        """Tell the writer that the announced weights cannot be reached; it looks at `needs_snapshot`.

        A complaint about weights that are not announced means nothing and is dropped.
        """
        head = self.head()
        if head is not None and head.weights_id == identity.weights_id:
            write_atomic(self.root / COMPLAINT, head.weights_id.encode(), durable=False)

    def needs_snapshot(self) -> bool:
        """Whether a reader complained about the announced weights, and no snapshot of them verifies; or HEAD cannot be read.

        A complaint is dropped once a snapshot of them verifies.
        """
        head, complaint = self.head_to_replace(), _read(self.root / COMPLAINT)
        if head is None:
            return (self.root / HEAD).exists()
        if complaint != head.weights_id.encode():
            return False
        snapshots = [m for m in self.manifests() if m.weights_id == head.weights_id and m.kind is WeightsKind.SNAPSHOT]
        if any(self._is_whole(snapshot) for snapshot in snapshots):
            (self.root / COMPLAINT).unlink(missing_ok=True)
            return False
        return True

    def register(self, reader: str, weights_id: str | None) -> None:
        """Say, at least once in READER_S, that a reader lives and which weights it serves (None: none yet).

        Raises:
            InputError: the name cannot be a file's.
        """
        self._readers.register(reader, weights_id)

    def prune(self, keep_snapshots: int) -> None:
        """Remove every publication that neither a late joiner nor a living reader may need. What stays:

        - the newest `keep_snapshots` snapshots, and every delta that is newer than the oldest of them;
        - all publications of the announced weights, and those by which a reader without weights gets to them
          with the fewest bytes;
        - for each living reader, the deltas with the fewest bytes from what it serves to the announced weights: forward
          from its version or, from a dead incarnation, back to the fork by invertible ones and forward from there.
          Not if they have more bytes than a snapshot: that is what such a reader had better read.

        A reader may have planned with a publication that is gone when it asks for it: it plans again, with what is listed then.
        """
        head = self.head()
        needed = still_needed(self.manifests(), head, self._readers.living().values(), keep_snapshots)
        announced = "" if head is None else _without_kind(head.folder_name)
        for folder in self._publications():
            if folder.name not in needed and _without_kind(folder.name) != announced:
                self._remove(folder)

    def _publications(self) -> list[Path]:
        return list(self.root.glob("[0-9]*"))

    def _manifest(self, folder: Path) -> WeightManifest | None:
        text = _read(folder / MANIFEST)
        if text is None and not folder.exists():
            return None  # removed since it was listed
        return parse_publication(text, where=str(folder), folder_name=folder.name)

    def _is_whole(self, manifest: WeightManifest) -> bool:
        try:
            self.verify(manifest)
        except IntegrityError as error:
            logger.warning("%s", error)
            return False
        return True

    def _place(self, staged: Path, manifest: WeightManifest) -> WeightManifest:
        target = self.folder(manifest)
        if target.exists():
            standing = self._manifest(target)
            if standing is not None and self._is_whole(standing):
                shutil.rmtree(staged)
                return standing
            self._remove(target)  # whoever reads it meanwhile finds it missing, as damaged as before
        os.rename(staged, target)
        fsync_path(self.root)
        return manifest

    def _remove(self, folder: Path) -> None:
        """Take a publication out of sight at once, then remove it."""
        gone = self.stage()
        os.rename(folder, gone / folder.name)
        shutil.rmtree(gone)

    def _refuse_older_incarnation(self, staged: Path, version: PolicyVersion) -> None:
        head = self.head_to_replace()
        if head is not None and head.version.incarnation > version.incarnation:
            shutil.rmtree(staged)
            raise FencedError(
                f"weights {version} are not published, since {self.root / HEAD} announces {head.version}: "
                "another trainer has taken over; end this one"
            )


def _without_kind(folder_name: str) -> str:
    return folder_name.rpartition("-")[0]


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
