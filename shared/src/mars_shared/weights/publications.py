"""Files and manifests of publications: how they are named, described and read, wherever they are."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from blake3 import blake3
from pydantic import ValidationError

from mars_shared.contracts import WeightFile, WeightManifest
from mars_shared.errors import IntegrityError

logger = logging.getLogger(__name__)

HEAD = "HEAD"
MANIFEST = "manifest.json"
COMPLAINT = "complaint"
"""Holds the id of the announced weights that a reader could not reach."""
FOLDER = re.compile(r"\d+\.\d+-[0-9a-f]{16}-(snapshot|delta)")
"""A publication's folder."""


def model_fingerprint(folder: Path) -> str:
    """Hash of a model folder's configuration: weights fit the architecture that has the same one."""
    return sha256((folder / "config.json").read_bytes()).hexdigest()


def describe_file(path: Path) -> WeightFile:
    """Size and hash of a file."""
    hasher = blake3(max_threads=blake3.AUTO)
    hasher.update_mmap(path)
    return WeightFile(name=path.name, size_bytes=path.stat().st_size, blake3=hasher.hexdigest())


def parse_manifest(text: bytes, *, where: str) -> WeightManifest:
    """Read HEAD or a manifest.json.

    Raises:
        IntegrityError: it is not a manifest.
    """
    try:
        return WeightManifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise IntegrityError(
            f"{where}: not a weight manifest: expected the JSON of one, came {text[:40]!r}, "
            f"{'.'.join(map(str, first['loc'])) or 'at the top'}: {first['msg']}; the trainer writes it anew with its next version"
        ) from error


def parse_publication(text: bytes | None, *, where: str, folder_name: str) -> WeightManifest | None:
    """Read the manifest.json of a publication; None, and a line in the log, if it does not describe that folder."""
    if text is None:
        logger.warning("%s has no %s and counts as no publication", where, MANIFEST)
        return None
    try:
        manifest = parse_manifest(text, where=f"{where}/{MANIFEST}")
    except IntegrityError as error:
        logger.warning("%s; the folder counts as no publication", error)
        return None
    if manifest.folder_name != folder_name:
        logger.warning("%s holds the manifest of %s and counts as no publication", where, manifest.folder_name)
        return None
    return manifest


def in_order(manifests: Iterable[WeightManifest]) -> list[WeightManifest]:
    """By version, a delta before the snapshot of the same weights."""
    return sorted(manifests, key=lambda m: (m.version, m.weights_id, m.kind))
