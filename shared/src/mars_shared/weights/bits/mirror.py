"""A replica's own copy of the weights that it serves: safetensors files that deltas are applied to, in place.

What is refused leaves the copy as it was. From the first written byte until the last check has passed the copy holds no
weights that have a name; if it stays so it is broken, and only a snapshot mends it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from mars_shared.contracts import WeightIdentity, WeightManifest, WeightsKind
from mars_shared.errors import IntegrityError
from mars_shared.weights.bits import codec
from mars_shared.weights.bits.delta import DeltaReader, DeltaRecord, delta_meta
from mars_shared.weights.bits.sums import ModelSums
from mars_shared.weights.bits.tensor_file import StoredTensor, TensorFile

PREFIX = "mirror-"
"""Begins the names of the mirror's files; it touches no others in its folder."""


class Mirror:
    """The weights in a private folder; for one caller at a time.

    >>> mirror = Mirror(Path("/dev/shm/replica-0"))
    >>> mirror.take_snapshot(snapshot, [Path("weights/1.40-3f9c2a6b1d00e4f7-snapshot/model.safetensors")])
    >>> changed = mirror.apply(delta, Path("fetched/delta.mars"))
    >>> str(mirror.weights.version)
    '1.41'
    """

    _weights: WeightIdentity | None
    _files: list[TensorFile]
    _tensors: dict[str, StoredTensor]
    _sums: ModelSums

    def __init__(self, folder: Path) -> None:
        """Begin with nothing: what an earlier mirror left in the folder is removed."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        self._clear()

    @property
    def weights(self) -> WeightIdentity | None:
        """What it holds, whole and checked; None if that is nothing, or broken."""
        return self._weights

    @property
    def paths(self) -> tuple[Path, ...]:
        """Its safetensors files; none while it holds nothing."""
        return () if self._weights is None else tuple(file.path for file in self._files)

    def take_snapshot(self, manifest: WeightManifest, files: Sequence[Path]) -> frozenset[str]:
        """Hold a copy of a snapshot's files; returns the names of all its tensors.

        Raises:
            IntegrityError: they are not what the manifest says, and what was held stays; or the copy came out differently.
            OSError: a file cannot be read, or there is no room for the copy, which is removed.
        """
        sums = _snapshot_sums(manifest, files)
        self._clear()
        try:
            self._files = [self._copy(path) for path in files]
        except OSError:
            self._clear()
            raise
        self._tensors = {name: tensor for file in self._files for name, tensor in file.tensors.items()}
        self._sums = sums
        self._check_bits(manifest)
        self._weights = manifest.identity
        return frozenset(sums)

    def apply(self, manifest: WeightManifest, delta: Path) -> frozenset[str]:
        """Go from a delta's base to its target; returns the names of the changed tensors.

        Raises:
            IntegrityError: the delta is damaged or does not fit what is held, and nothing is written; or what it makes is
                not what the manifest says, and the mirror is broken.
        """
        return self._follow(manifest, delta, backward=False)

    def undo(self, manifest: WeightManifest, delta: Path) -> frozenset[str]:
        """Go from a delta's target back to its base; returns the names of the changed tensors.

        Raises:
            IntegrityError: as for `apply`; also the delta is not invertible.
        """
        if not manifest.invertible:
            raise IntegrityError(f"publication {manifest.folder_name} cannot be undone; plan another route")
        return self._follow(manifest, delta, backward=True)

    def rename(self, weights: WeightIdentity) -> None:
        """Hold the same bits under another identity.

        Raises:
            IntegrityError: it is of another run, model, dtype or checksum than what is held.
        """
        held, other = self._held(), weights.identity
        if held.model_copy(update={"version": other.version}) != other:
            raise IntegrityError(f"expected another version of the same bits as {held!r}, came {other!r}; plan the route again")
        self._weights = other

    def verify_full(self) -> None:
        """Compare every byte with the checksums that were kept up to date.

        Raises:
            IntegrityError: tensors differ, and the mirror is broken; or it holds nothing.
        """
        self._check_bits(self._held())

    def _follow(self, manifest: WeightManifest, path: Path, *, backward: bool) -> frozenset[str]:
        base, target = _ends(manifest)
        start, end = (target, base) if backward else (base, target)
        if (held := self._held()) != start:
            raise IntegrityError(f"expected the delta to lead from {_named(held)}, which is held; it leads from {_named(start)}")
        delta = DeltaReader(path)
        if delta.meta != (expected := delta_meta(base, target.version)):
            raise IntegrityError(f"{path} says it is the delta {delta.meta}; expected {expected} as in its manifest")
        checksums = self._rehearse(delta, backward)
        self._weights = None
        self._patch(delta, backward)
        wrong = [] if backward else [name for name, checksum in checksums.items() if self._sums[name].checksum != checksum]
        if wrong or self._sums.checksum != end.checksum:
            which = ", ".join(wrong) or "which ones the delta cannot tell"
            raise IntegrityError(f"{path} did not make the weights {_named(end)}: tensors differ ({which}); take a snapshot")
        self._weights = end
        return frozenset(checksums)

    def _rehearse(self, delta: DeltaReader, backward: bool) -> dict[str, int]:
        """Go through all of a delta without writing; returns the checksum after it of every tensor that it changes."""
        checksums = {}
        for record in delta:
            bits = self._tensor_of(record).bits
            if backward and self._sums[record.name].checksum != record.checksum:
                raise IntegrityError(f"the delta makes another tensor {record.name} than the one that is held; take a snapshot")
            codec.check(bits, record.encoded, backward=backward)
            checksums[record.name] = record.checksum
        return checksums

    def _patch(self, delta: DeltaReader, backward: bool) -> None:
        patch = codec.undo if backward else codec.apply
        for record in delta:
            self._sums.change(record.name, patch(self._tensor_of(record).bits, record.encoded))

    def _tensor_of(self, record: DeltaRecord) -> StoredTensor:
        tensor = self._tensors.get(record.name)
        if tensor is None:
            raise IntegrityError(f"the delta changes a tensor {record.name}, which the held weights don't have; take a snapshot")
        if (tensor.dtype, tensor.shape) != (record.dtype, record.shape):
            raise IntegrityError(
                f"tensor {record.name}: expected {tensor.dtype} {tensor.shape} as held, "
                f"the delta changes {record.dtype} {record.shape}; take a snapshot"
            )
        return tensor

    def _held(self) -> WeightIdentity:
        if self._weights is None:
            raise IntegrityError(f"the mirror in {self._folder} holds no whole weights; take a snapshot")
        return self._weights

    def _check_bits(self, weights: WeightIdentity) -> None:
        actual = ModelSums()
        for name, tensor in self._tensors.items():
            actual.add(name, tensor.dtype, tensor.shape, tensor.bits)
        if wrong := actual.differing(self._sums):
            self._weights = None
            raise IntegrityError(
                f"the mirror in {self._folder} does not hold the bits of {_named(weights)}: "
                f"tensors {', '.join(wrong)} differ; take a snapshot"
            )

    def _copy(self, path: Path) -> TensorFile:
        """A copy with disk blocks of its own: not the store's, and none that could run out when they are written to."""
        return TensorFile(shutil.copyfile(path, self._folder / f"{PREFIX}{path.name}"), writable=True)

    def _clear(self) -> None:
        self._weights = None
        self._files = []
        self._tensors = {}
        self._sums = ModelSums()
        for path in self._folder.glob(f"{PREFIX}*"):
            path.unlink()


def _snapshot_sums(manifest: WeightManifest, files: Sequence[Path]) -> ModelSums:
    """Checksums of all tensors in a snapshot's files, after a look whether they are what the manifest says."""
    expected = sorted((file.name, file.size_bytes) for file in manifest.files)
    actual = sorted((path.name, path.stat().st_size) for path in files)
    if manifest.kind is not WeightsKind.SNAPSHOT or actual != expected:
        raise IntegrityError(f"expected a snapshot's files {expected}, came {actual} for {manifest.folder_name}; fetch it again")
    sums = ModelSums()
    for path in files:
        with TensorFile(path) as file:
            for name, tensor in file.tensors.items():
                if name in sums or tensor.dtype != manifest.dtype:
                    raise IntegrityError(f"{path}: tensor {name} is {tensor.dtype}; expected it once, in {manifest.dtype}")
                sums.add(name, tensor.dtype, tensor.shape, tensor.bits)
    if sums.checksum != manifest.checksum:
        raise IntegrityError(
            f"the tensors of snapshot {manifest.folder_name} have checksum {sums.checksum}, its manifest says {manifest.checksum}; "
            "fetch it again, or wait for another snapshot"
        )
    return sums


def _ends(manifest: WeightManifest) -> tuple[WeightIdentity, WeightIdentity]:
    """A delta's base and target."""
    if manifest.base is None:
        raise IntegrityError(f"expected a delta, came {manifest.folder_name}; take it as a snapshot")
    return manifest.base.identity, manifest.identity


def _named(weights: WeightIdentity) -> str:
    return f"{weights.version} ({weights.weights_id[:16]})"
