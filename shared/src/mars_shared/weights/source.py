"""Where a replica gets weights from: the shared volume, the trainer over HTTP, or any fsspec URL."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from pydantic import SecretStr

from mars_shared.contracts import WeightFile, WeightIdentity, WeightManifest
from mars_shared.errors import ConfigError
from mars_shared.masking import without_credentials
from mars_shared.weights.source_fsspec import FsspecSource
from mars_shared.weights.source_http import HttpSource
from mars_shared.weights.source_volume import VolumeSource


class WeightSource(Protocol):
    """A weights store as its readers see it.

    Every method raises WeightsUnavailableError if the store does not answer: try again later. What a source says is wrong
    with a publication is an IntegrityError: take another way, and complain if there is none.
    """

    async def head(self) -> WeightManifest | None:
        """A manifest of the announced version; None before the first. Cheap enough to poll."""

    async def manifests(self) -> list[WeightManifest]:
        """Of all publications, by version."""

    async def fetch(self, manifest: WeightManifest, file: WeightFile, target: Path) -> None:
        """Bring a publication's file to `target`, whose folder exists.

        It is hashed on its way and in its place only once it is verified. What was cut off goes on where it ended, in this
        call and in the next for the same target. One call at a time per target; nothing is fsynced.

        Raises:
            IntegrityError: size or hash differ, or (WeightsMissingError) the file is not in the store.
            WeightsUnavailableError: the source does not answer after several tries.
        """

    async def complain(self, identity: WeightIdentity) -> None:
        """Tell the trainer that the announced weights cannot be reached; it publishes a snapshot of them."""

    async def register(self, reader: str, weights_id: str | None) -> None:
        """Say that a reader lives and what it serves (None: nothing yet); to be renewed within READER_S.

        Raises:
            InputError: the name cannot be a file's.
        """

    async def aclose(self) -> None:
        """Release connections."""


def open_source(url: str | None, root: Path, api_key: SecretStr | None = None) -> WeightSource:
    """The source that a URL names.

    Args:
        url: None for the shared volume; "http://trainer:8300" for the trainer; else any URL of fsspec's, "s3://bucket/run".
        root: the store's folder on the shared volume; used without a URL alone.
        api_key: for HTTP.

    Raises:
        ConfigError: it is no URL, or the package that its scheme needs is not installed.
    """
    if url is None:
        return VolumeSource(root)
    scheme, separator, _ = url.partition("://")
    if not separator or not scheme:
        raise ConfigError(
            f"{without_credentials(url)!r} is no URL of a weights store; expected http://HOST:PORT or SCHEME://PATH, such as s3://bucket/run"
        )
    if scheme in ("http", "https"):
        return HttpSource(url, api_key)
    return FsspecSource(url)
