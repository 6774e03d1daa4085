"""Images by content: the original encoded bytes under their blake3 hash.

Messages name images by hash alone; every reader verifies what it read, so sampler, reward
and trainer see the same bytes.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from blake3 import blake3

from mars_shared.errors import BlobMissingError, InputError, IntegrityError
from mars_shared.files import write_atomic

_HASH = re.compile(r"[0-9a-f]{64}")


class BlobStore:
    """A folder of blobs. Training blobs stay; uploads of ad-hoc requests expire.

    Example:
        store = BlobStore(Path("runs/demo/blobs"))
        store.get(store.put(b"...")) == b"..."
    """

    def __init__(self, root: Path) -> None:
        self._kept = root / "kept"
        self._uploads = root / "uploads"
        for folder in (self._kept, self._uploads):
            folder.mkdir(parents=True, exist_ok=True)

    def put(self, data: bytes) -> str:
        """Store bytes for good; idempotent. Returns their hash."""
        return self._write(self._kept, data)

    def put_upload(self, data: bytes) -> str:
        """Store bytes that `sweep_uploads` may remove later. Returns their hash."""
        name = blake3(data).hexdigest()
        try:
            os.utime(self._path(self._uploads, name))
        except FileNotFoundError:
            return self._write(self._uploads, data)
        return name

    def get(self, name: str) -> bytes:
        """The bytes under a hash.

        Raises:
            InputError: `name` is not a blake3 hash.
            BlobMissingError: nothing is stored under it.
            IntegrityError: what is stored has another hash.
        """
        if not _HASH.fullmatch(name):
            raise InputError(f"blob {name[:80]!r}: not a blake3 hash; expected 64 lower-case hex digits")
        for folder in (self._kept, self._uploads):
            path = self._path(folder, name)
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                continue
            actual = blake3(data).hexdigest()
            if actual != name:
                raise IntegrityError(f"blob {name}: {path} holds bytes with hash {actual}; delete the file and put it again")
            return data
        raise BlobMissingError(f"blob {name}: not in the store {self._kept.parent}; put its bytes first")

    def contains(self, name: str) -> bool:
        """Whether bytes are stored under a hash (not verified)."""
        return any(self._path(folder, name).is_file() for folder in (self._kept, self._uploads))

    def sweep_uploads(self, ttl_s: float) -> int:
        """Remove uploads that nobody stored again for `ttl_s` seconds. Returns how many."""
        oldest = time.time() - ttl_s
        removed = 0
        for path in self._uploads.glob("??/*"):
            try:
                expired = path.stat().st_mtime < oldest
            except FileNotFoundError:
                continue  # another replica sweeps too
            if expired:
                path.unlink(missing_ok=True)
                removed += 1
        return removed

    def _write(self, folder: Path, data: bytes) -> str:
        name = blake3(data).hexdigest()
        path = self._path(folder, name)
        if not (path.exists() and path.stat().st_size == len(data)):
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, data, durable=False)  # readers verify, and a torn file is written again
        return name

    @staticmethod
    def _path(folder: Path, name: str) -> Path:
        return folder / name[:2] / name
