"""The weights store: immutable, verified snapshots, and a HEAD file that announces the newest.

    root/
      HEAD                      manifest of the newest version (JSON, replaced atomically)
      1.7-3f9c.../              one folder per snapshot: files and manifest.json

The trainer publishes; replicas pull when HEAD changes. Nothing here knows what a tensor is.
"""

from __future__ import annotations

import os
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Literal
from uuid import uuid4

from blake3 import blake3
from pydantic import ValidationError

from mars_shared.contracts import PolicyVersion, WeightFile, WeightManifest
from mars_shared.errors import FencedError, IntegrityError
from mars_shared.faults import fault
from mars_shared.files import fsync_path, write_atomic

MANIFEST = "manifest.json"
COMPLAINT = "complaint"
"""Holds the id of a snapshot that a reader could not verify."""


def model_fingerprint(folder: Path) -> str:
    """Hash of a model folder's configuration: weights fit the architecture that has the same one."""
    return sha256((folder / "config.json").read_bytes()).hexdigest()


def describe_file(path: Path) -> WeightFile:
    """Size and hash of a file."""
    hasher = blake3(max_threads=blake3.AUTO)
    hasher.update_mmap(path)
    return WeightFile(name=path.name, size_bytes=path.stat().st_size, blake3=hasher.hexdigest())


class WeightsStore:
    """A folder that the trainer writes and any number of replicas read."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)

    def sweep(self) -> None:
        """Remove what a publication that was cut off left behind; for the store's one writer."""
        for folder in self._root.glob(".staged-*"):
            shutil.rmtree(folder)

    def head(self) -> WeightManifest | None:
        """The newest published version; None before the first.

        Raises:
            IntegrityError: HEAD is not a manifest.
        """
        try:
            text = (self._root / "HEAD").read_bytes()
        except FileNotFoundError:
            return None
        try:
            return WeightManifest.model_validate_json(text)
        except ValidationError as error:
            raise IntegrityError(f"{self._root / 'HEAD'}: not a weight manifest ({error.error_count()} errors)") from error

    def stage(self) -> Path:
        """An empty folder inside the store, to write a snapshot's files into before `publish`."""
        folder = self._root / f".staged-{uuid4().hex}"
        folder.mkdir()
        return folder

    def publish(
        self, staged: Path, *, run: str, version: PolicyVersion, model: str, dtype: Literal["float32", "bfloat16"]
    ) -> WeightManifest:
        """Make a staged folder an immutable snapshot and announce it, durably and in that order.

        Raises:
            FencedError: HEAD is of a newer incarnation; the staged folder is removed.
        """
        files = sorted(staged.iterdir())
        for file in files:
            fsync_path(file)
        manifest = WeightManifest(
            run=run, version=version, model=model, dtype=dtype, files=tuple(describe_file(file) for file in files)
        )
        content = manifest.model_dump_json().encode()
        write_atomic(staged / MANIFEST, content)
        self._refuse_older_incarnation(staged, version)
        target = self.folder(manifest)
        if target.exists():
            # A damaged one; whoever reads it meanwhile finds it missing, as damaged as before.
            os.rename(target, staged.with_name(f"{staged.name}-damaged"))
        os.rename(staged, target)
        fsync_path(self._root)
        self.sweep()
        (self._root / COMPLAINT).unlink(missing_ok=True)
        fault("trainer.before_announce")
        write_atomic(self._root / "HEAD", content)
        return manifest

    def complain(self, manifest: WeightManifest) -> None:
        """Tell the writer that a version's files don't verify; it looks at `is_damaged`."""
        write_atomic(self._root / COMPLAINT, manifest.weights_id.encode(), durable=False)

    def is_damaged(self) -> bool:
        """Whether a reader complained about HEAD, and rightly."""
        head = self.head()
        try:
            complaint = (self._root / COMPLAINT).read_text(encoding="utf-8")
        except FileNotFoundError:
            return False
        if head is None or complaint != head.weights_id:
            return False
        try:
            self.verify(head)
        except IntegrityError:
            return True
        (self._root / COMPLAINT).unlink(missing_ok=True)
        return False

    def _refuse_older_incarnation(self, staged: Path, version: PolicyVersion) -> None:
        head = self.head()
        if head is not None and head.version.incarnation > version.incarnation:
            shutil.rmtree(staged)
            raise FencedError(
                f"weights {version} are not published, since {self._root / 'HEAD'} announces {head.version}: "
                "another trainer has taken over; end this one"
            )

    def folder(self, manifest: WeightManifest) -> Path:
        """Where a version's files are, verified or not."""
        return self._root / f"{manifest.version}-{manifest.weights_id[:16]}"

    def verify(self, manifest: WeightManifest) -> Path:
        """The version's folder, after every file was checked against the manifest.

        Raises:
            IntegrityError: a file is missing, or its size or hash differs.
        """
        folder = self.folder(manifest)
        for expected in manifest.files:
            path = folder / expected.name
            try:
                actual = describe_file(path)
            except FileNotFoundError as error:
                raise IntegrityError(f"weights {manifest.version}: {path} is missing") from error
            if actual != expected:
                raise IntegrityError(
                    f"weights {manifest.version}: {path} has {actual.size_bytes} bytes and hash {actual.blake3}; "
                    f"expected {expected.size_bytes} and {expected.blake3}"
                )
        return folder

    def prune(self, keep: int) -> None:
        """Remove all but the newest `keep` snapshots; HEAD stays."""
        head = self.head()
        snapshots = sorted(self._root.glob("[0-9]*"), key=_publication_order)
        for folder in snapshots[:-keep]:
            if head is None or folder != self.folder(head):
                shutil.rmtree(folder)


def _publication_order(folder: Path) -> tuple[int, int]:
    incarnation, step = folder.name.split("-")[0].split(".")
    return int(incarnation), int(step)
