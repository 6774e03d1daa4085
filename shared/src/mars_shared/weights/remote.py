"""A folder behind an fsspec URL: the one place that knows fsspec."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from mars_shared.errors import ConfigError, WeightsUnavailableError
from mars_shared.masking import without_credentials


class RemoteFolder:
    """Files by name below a URL, e.g. `RemoteFolder("s3://bucket/run").read("HEAD")`. Blocks: call it in threads.

    All methods raise WeightsUnavailableError when the store behind the URL does not answer, ConfigError when it forbids.

    Raises:
        ConfigError: the scheme is unknown, its driver is not installed, or the driver refuses the URL.
    """

    def __init__(self, url: str) -> None:
        self.shown_url = without_credentials(url)
        try:
            from fsspec.core import url_to_fs  # of the extra "weights", which a bare install of mars-shared lacks
        except ImportError as error:
            raise ConfigError(f"{self.shown_url} needs the package fsspec; install mars-shared[weights]") from error
        try:
            self._fs, self._root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{self.shown_url} cannot be used as a weights store: {error}") from error

    def read(self, name: str) -> bytes | None:
        """A file's content; None if there is no such file."""
        with self._asking(name):
            try:
                content: bytes = self._fs.cat_file(self._path(name))
            except (FileNotFoundError, IsADirectoryError):
                return None
        return content

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file; fewer where it ends."""
        with self._asking(name):
            content: bytes = self._fs.cat_file(self._path(name), start=start, end=end)
        return content

    def size_bytes(self, name: str) -> int | None:
        """A file's size; None if there is no such file."""
        self._fs.invalidate_cache()
        with self._asking(name):
            try:
                return int(self._fs.size(self._path(name)))
            except FileNotFoundError:
                return None

    def names(self, folder: str = "") -> list[str]:
        """Last parts of the paths in a folder; none if there is no such folder."""
        self._fs.invalidate_cache()
        with self._asking(folder):
            try:
                paths = self._fs.ls(self._path(folder), detail=False)
            except FileNotFoundError:
                return []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)

    def write(self, name: str, content: bytes) -> None:
        """Replace a file; a reader sees the old content or the new."""
        path = self._path(name)
        folder, _, last = path.rpartition("/")
        fresh = f"{folder}/.{last}.{uuid4().hex}"
        with self._asking(name):
            self._fs.makedirs(folder, exist_ok=True)
            self._fs.pipe_file(fresh, content)
            self._fs.mv(fresh, path)

    def upload(self, file: Path, name: str) -> None:
        """Copy a local file, which a reader may see half of meanwhile."""
        path = self._path(name)
        with self._asking(name):
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(file), path)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all in it, if it is there."""
        with self._asking(name):
            try:
                self._fs.rm(self._path(name), recursive=True)
            except FileNotFoundError:
                return

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}".rstrip("/")

    @contextmanager
    def _asking(self, name: str) -> Iterator[None]:
        try:
            yield
        except PermissionError as error:
            raise ConfigError(f"{self.shown_url}/{name} is forbidden ({error}); check the credentials of this process") from error
        except Exception as error:  # every driver has errors of its own, which have no common base
            raise WeightsUnavailableError(f"{self.shown_url}/{name}: no answer ({type(error).__name__}: {error})") from error
