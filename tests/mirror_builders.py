"""Small models, their versions, and snapshots and deltas of them as real files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mars_shared.contracts import PolicyVersion, WeightIdentity, WeightManifest
from mars_shared.errors import IntegrityError
from mars_shared.weights import describe_file
from mars_shared.weights.bits.checksum import tensor_checksum
from mars_shared.weights.bits.codec import Kind, encode
from mars_shared.weights.bits.delta import DeltaWriter, delta_meta
from mars_shared.weights.bits.mirror import Mirror
from mars_shared.weights.bits.sums import ModelSums

Model = dict[str, np.ndarray[Any, Any]]
NAMES = {"a.safetensors": ["embed.weight", "norm.weight"], "b.safetensors": ["head.weight", "scale", "empty"]}
"""A snapshot's files and their tensors."""


def first_model() -> Model:
    """float32, as the safetensors package writes it from numpy; with NaN, infinity and -0.0."""
    random = np.random.default_rng(0)
    values = {
        "embed.weight": random.normal(size=(40, 16)),
        "norm.weight": np.tile([np.nan, np.inf, -np.inf, -0.0, 0.0, 1.0], 20),
        "head.weight": random.normal(size=(16, 8)),
        "scale": np.array(1.5),
        "empty": np.zeros((0, 3)),
    }
    return {name: array.astype(np.float32) for name, array in values.items()}


def bits_of(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array.reshape(-1).view(np.uint32)


def sums_of(model: Model) -> ModelSums:
    sums = ModelSums()
    for name, array in model.items():
        sums.add(name, "float32", array.shape, bits_of(array))
    return sums


def identity(tensors: Model, step: int, **changes: Any) -> WeightIdentity:
    values: dict[str, Any] = {"run": "r", "model": "m", "dtype": "float32", "checksum": sums_of(tensors).checksum}
    return WeightIdentity(version=PolicyVersion(incarnation=1, step=step), **values | changes)


@dataclass(frozen=True)
class Publication:
    manifest: WeightManifest
    files: tuple[Path, ...]

    @property
    def delta(self) -> tuple[WeightManifest, Path]:
        return self.manifest, self.files[0]


def publication(weights: WeightIdentity, files: list[Path], **values: Any) -> Publication:
    manifest = WeightManifest(**weights.model_dump(), files=tuple(describe_file(file) for file in files), **values)
    return Publication(manifest, tuple(files))


def snapshot(folder: Path, model: Model, weights: WeightIdentity) -> Publication:
    folder.mkdir()
    for file, names in NAMES.items():
        save_file({name: model[name] for name in names}, folder / file)
    return publication(weights, sorted(folder.iterdir()), kind="snapshot")


def write_delta(path: Path, meta: dict[str, str], old: Model, new: Model) -> bool:
    """Write what differs; returns whether it can be undone."""
    kinds = []
    with path.open("wb") as file:
        writer = DeltaWriter(file, meta)
        for name, array in new.items():
            encoded, _ = encode(bits_of(old[name]), bits_of(array))
            if encoded is not None:
                writer.add(name, "float32", array.shape, encoded, tensor_checksum(bits_of(array)))
                kinds.append(encoded.kind)
        writer.close()
    return Kind.WHOLE not in kinds


def delta(folder: Path, old: Model, new: Model, base: WeightIdentity, target: WeightIdentity) -> Publication:
    folder.mkdir(exist_ok=True)
    path = folder / f"delta-{base.version}-{target.version}.mars"
    invertible = write_delta(path, delta_meta(base, target.version), old, new)
    return publication(target, [path], kind="delta", base=base, invertible=invertible)


def next_model(model: Model, step: int) -> Model:
    """Some elements of one or two tensors go a few units of the last place up or down, modulo 2^32."""
    random = np.random.default_rng(step)
    new = {name: array.copy() for name, array in model.items()}
    for name in random.choice(["embed.weight", "norm.weight", "head.weight"], 2):
        bits = bits_of(new[name])
        places = random.integers(0, bits.size, 1 + bits.size // 50)
        bits[places] += random.integers(-3, 4, places.size).astype(np.uint32)
    return new


@dataclass
class History:
    """Versions 1.0, 1.1, ... with a snapshot of the first and a delta to each later one."""

    models: list[Model]
    weights: list[WeightIdentity]
    snapshot: Publication
    deltas: list[Publication]
    """deltas[n] leads from version n to n + 1."""


def history(folder: Path, steps: int) -> History:
    models = [first_model()]
    for step in range(1, steps + 1):
        models.append(next_model(models[-1], step))
    weights = [identity(model, step) for step, model in enumerate(models)]
    deltas = [delta(folder / "deltas", *models[n : n + 2], *weights[n : n + 2]) for n in range(steps)]
    return History(models, weights, snapshot(folder / "snapshot", models[0], weights[0]), deltas)


def mirror_of_1_1(folder: Path, past: History) -> Mirror:
    """A mirror that took the snapshot 1.0 and the delta to 1.1."""
    mirror = Mirror(folder)
    mirror.take_snapshot(past.snapshot.manifest, past.snapshot.files)
    mirror.apply(*past.deltas[0].delta)
    return mirror


def meta_of(past: History, step: int) -> dict[str, str]:
    return delta_meta(past.weights[step], past.weights[step + 1].version)


def content(mirror: Mirror) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """Shape and bytes of every tensor, as the safetensors package finds them in the mirror's files."""
    tensors = {name: array for path in mirror.paths for name, array in load_file(path).items()}
    return {name: (array.shape, array.tobytes()) for name, array in tensors.items()}


def expected(model: Model) -> dict[str, tuple[tuple[int, ...], bytes]]:
    return {name: (array.shape, array.tobytes()) for name, array in model.items()}


def changed(old: Model, new: Model) -> set[str]:
    return {name for name in old if old[name].tobytes() != new[name].tobytes()}


def mend(mirror: Mirror, past: History) -> None:
    """A snapshot mends a broken mirror, and nothing else does."""
    assert (mirror.weights, mirror.paths) == (None, ())
    for refused in (
        lambda: mirror.apply(*past.deltas[1].delta),
        lambda: mirror.undo(*past.deltas[0].delta),
        lambda: mirror.rename(past.weights[1]),
        mirror.verify_full,
    ):
        with pytest.raises(IntegrityError, match="holds no whole weights; take a snapshot"):
            refused()
    mirror.take_snapshot(past.snapshot.manifest, past.snapshot.files)
    mirror.apply(*past.deltas[0].delta)
    assert mirror.weights == past.weights[1]
    assert content(mirror) == expected(past.models[1])
