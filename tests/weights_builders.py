"""What tests of the weights store share: publications whose files are a few bytes."""

from __future__ import annotations

from blake3 import blake3

from mars_shared.contracts import PolicyVersion, WeightIdentity, WeightManifest, WeightsKind
from mars_shared.weights import WeightsStore

SNAPSHOT_FILE, DELTA_FILE = "model.safetensors", "delta.mars"


def weights(step: int, *, incarnation: int = 1, content: bytes | None = None, run: str = "r") -> WeightIdentity:
    """The identity of weights whose tensors are `content`; unless given it is the version's own."""
    version = PolicyVersion(incarnation=incarnation, step=step)
    content = str(version).encode() if content is None else content
    return WeightIdentity(run=run, version=version, model="m", dtype="float32", checksum=blake3(content).hexdigest())


def publish_snapshot(
    store: WeightsStore, identity: WeightIdentity, content: bytes = b"tensors", *, announce: bool = True
) -> WeightManifest:
    staged = store.stage()
    (staged / SNAPSHOT_FILE).write_bytes(content)
    return store.publish(staged, identity=identity, kind=WeightsKind.SNAPSHOT, announce=announce)


def publish_delta(
    store: WeightsStore,
    identity: WeightIdentity,
    base: WeightIdentity,
    content: bytes = b"steps",
    *,
    invertible: bool = False,
    announce: bool = True,
) -> WeightManifest:
    staged = store.stage()
    (staged / DELTA_FILE).write_bytes(content)
    return store.publish(staged, identity=identity, kind=WeightsKind.DELTA, base=base, invertible=invertible, announce=announce)


def listed(store: WeightsStore) -> list[str]:
    """What the store holds, by version: ["1.0 snapshot", "1.1 delta"]."""
    return [f"{manifest.version} {manifest.kind}" for manifest in store.manifests()]
