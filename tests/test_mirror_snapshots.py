"""A replica's copy of the weights takes only snapshots that are what they say, whole and on its own disk blocks."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest

from mars_shared.contracts import WeightManifest
from mars_shared.errors import IntegrityError
from mars_shared.weights.bits.mirror import Mirror
from mirror_builders import (
    History,
    content,
    expected,
    history,
    mend,
    mirror_of_1_1,
    publication,
)


@pytest.fixture
def past(tmp_path: Path) -> History:
    return history(tmp_path, 3)


@pytest.fixture
def mirror(tmp_path: Path, past: History) -> Mirror:
    """Holds version 1.1."""
    return mirror_of_1_1(tmp_path / "mirror", past)


def copied(past: History, folder: Path) -> list[Path]:
    folder.mkdir()
    return [Path(shutil.copy(path, folder)) for path in past.snapshot.files]


def shortened(past: History, folder: Path) -> list[Path]:
    files = copied(past, folder)
    files[1].write_bytes(files[1].read_bytes()[:-1])
    return files


def flipped(past: History, folder: Path) -> list[Path]:
    files = copied(past, folder)
    data = bytearray(files[1].read_bytes())
    data[-1] ^= 128
    files[1].write_bytes(data)
    return files


def twice(past: History, folder: Path) -> tuple[WeightManifest, list[Path]]:
    files = copied(past, folder)
    files.append(Path(shutil.copy(files[0], folder / "c.safetensors")))
    return publication(past.weights[0], files, kind="snapshot").manifest, files


BAD_SNAPSHOTS = {
    "a file missing": (lambda past, folder: (past.snapshot.manifest, past.snapshot.files[:1]), "expected a snapshot's files"),
    "a file cut off": (lambda past, folder: (past.snapshot.manifest, shortened(past, folder)), "expected a snapshot's files"),
    "a bit flipped": (
        lambda past, folder: (past.snapshot.manifest, flipped(past, folder)),
        "have checksum .*, its manifest says",
    ),
    "another dtype": (
        lambda past, folder: (past.snapshot.manifest.model_copy(update={"dtype": "bfloat16"}), past.snapshot.files),
        "tensor .* is float32; expected it once, in bfloat16",
    ),
    "a tensor twice": (lambda past, folder: twice(past, folder), "tensor .* is float32; expected it once"),
    "a delta": (lambda past, folder: (past.deltas[0].manifest, past.deltas[0].files), "expected a snapshot's files"),
}


@pytest.mark.parametrize(("spoil", "said"), BAD_SNAPSHOTS.values(), ids=BAD_SNAPSHOTS.keys())
def test_a_bad_snapshot_is_refused_and_what_was_held_stays(
    spoil: Any, said: str, tmp_path: Path, past: History, mirror: Mirror
) -> None:
    manifest, files = spoil(past, tmp_path / "bad")
    with pytest.raises(IntegrityError, match=said):
        mirror.take_snapshot(manifest, files)
    assert mirror.weights == past.weights[1]
    assert content(mirror) == expected(past.models[1])


def test_a_copy_that_came_out_differently_is_not_held(past: History, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copyfile

    def copy_badly(source: Path, target: Path) -> Path:
        copy(source, target)
        data = bytearray(target.read_bytes())
        data[-1] ^= 1
        target.write_bytes(data)
        return target

    with monkeypatch.context() as disk:
        disk.setattr(shutil, "copyfile", copy_badly)
        with pytest.raises(IntegrityError, match=r"does not hold the bits of 1\.0 .*: tensors .*norm.weight.* differ"):
            mirror.take_snapshot(past.snapshot.manifest, past.snapshot.files)
    mend(mirror, past)


def test_a_copy_that_does_not_fit_on_the_disk_is_removed(
    tmp_path: Path, past: History, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy_half(source: Path, target: Path) -> Path:
        target.write_bytes(source.read_bytes()[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(shutil, "copyfile", copy_half)
        with pytest.raises(OSError, match="No space left"):
            mirror.take_snapshot(past.snapshot.manifest, past.snapshot.files)
    assert list((tmp_path / "mirror").iterdir()) == []
    mend(mirror, past)
