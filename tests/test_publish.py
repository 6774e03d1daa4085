"""What the trainer publishes: exact bits, as little as possible, readable by whoever comes from wherever."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mars_shared.contracts import PolicyVersion, WeightManifest, WeightsKind
from mars_shared.errors import NotReadyError
from mars_shared.settings import Recipe
from mars_shared.weights import WeightsStore
from mars_shared.weights.bits.mirror import Mirror
from mars_shared.weights.route import HopKind, plan_route
from mars_trainer.publish import SNAPSHOT_FILE, Publisher, StagedDelta, policy_tensors


class Tied(nn.Module):
    """Two layers that share one weight, as a policy shares its embedding with its head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(500, 30)
        self.head = nn.Linear(30, 500, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.randn(4, 3).T)
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def change(self, seed: int, size: float = 1e-4) -> None:
        """A few values, by little."""
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                mask = torch.rand(parameter.shape, generator=noise) < 0.05
                parameter.add_(mask * size * torch.randn(parameter.shape, generator=noise))


@pytest.fixture
def store(tmp_path: Path) -> WeightsStore:
    return WeightsStore(tmp_path / "weights")


def make_recipe(folder: Path, dtype: str = "float32", **weights: Any) -> Recipe:
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text('{"model_type": "tied"}')
    return Recipe.model_validate(
        {
            "run": {"name": "r", "dir": folder},
            "model": {"path": folder / "model", "dtype": dtype, "max_model_len": 64},
            "data": {"dataset": "digits"},
            "rollout": {"num_generations": 2, "max_completion_length": 8},
            "train": {"steps": 1, "prompts_per_step": 1, "learning_rate": 1e-3},
            "weights": weights,
        }
    )


def version(step: int, incarnation: int = 1) -> PolicyVersion:
    return PolicyVersion(incarnation=incarnation, step=step)


def expected(model: nn.Module, dtype: str) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy_tensors(model, getattr(torch, dtype))}


def bring(mirror: Mirror, store: WeightsStore, want: WeightManifest) -> list[HopKind]:
    """As a replica does; returns how."""
    route = plan_route(store.manifests(), mirror.weights.weights_id if mirror.weights else None, want.weights_id)
    for hop in route.hops:
        files = [store.verify(hop.manifest) / file.name for file in hop.manifest.files] if hop.manifest else []
        match hop.kind:
            case HopKind.SNAPSHOT:
                mirror.take_snapshot(hop.manifest, files)  # type: ignore[arg-type]
            case HopKind.APPLY:
                mirror.apply(hop.manifest, *files)  # type: ignore[arg-type]
            case HopKind.UNDO:
                mirror.undo(hop.manifest, *files)  # type: ignore[arg-type]
            case HopKind.RENAME:
                mirror.rename(hop.weights)
    return [hop.kind for hop in route.hops]


def holds(mirror: Mirror, tensors: dict[str, torch.Tensor]) -> bool:
    (path,) = mirror.paths
    held = load_file(path)
    return held.keys() == tensors.keys() and all(torch.equal(held[name], tensors[name]) for name in tensors)


def kinds(store: WeightsStore) -> list[str]:
    return [f"{manifest.version} {manifest.kind}" for manifest in store.manifests()]


def test_tied_weights_are_published_once_and_all_are_contiguous() -> None:
    tensors = dict(policy_tensors(Tied(), torch.bfloat16))
    assert set(tensors) == {"embed.weight", "scale", "temperature"}
    assert all(t.is_contiguous() and t.dtype is torch.bfloat16 and not t.requires_grad for t in tensors.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_version_is_a_snapshot_in_the_dtype_of_replicas(
    tmp_path: Path, store: WeightsStore, dtype: str, clean_environment: pytest.MonkeyPatch
) -> None:
    model = Tied()
    manifest = Publisher(make_recipe(tmp_path, dtype), store).publish(model, version(0))
    assert store.head() == manifest
    assert (manifest.run, manifest.dtype, manifest.kind) == ("r", dtype, WeightsKind.SNAPSHOT)
    assert manifest.model == hashlib.sha256(b'{"model_type": "tied"}').hexdigest()
    tensors = load_file(store.verify(manifest) / SNAPSHOT_FILE)
    assert tensors.keys() == {"embed.weight", "scale", "temperature"}
    for name, tensor in expected(model, dtype).items():
        assert torch.equal(tensors[name], tensor) and tensors[name].shape == tensor.shape


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_replica_that_follows_every_version_holds_the_very_bits(
    tmp_path: Path, store: WeightsStore, dtype: str, clean_environment: pytest.MonkeyPatch
) -> None:
    model, mirror = Tied(), Mirror(tmp_path / "mirror")
    publisher = Publisher(make_recipe(tmp_path, dtype), store)
    for step in range(6):
        manifest = publisher.publish(model, version(step))
        assert bring(mirror, store, manifest) == [HopKind.APPLY if step else HopKind.SNAPSHOT]
        assert holds(mirror, expected(model, dtype))
        model.change(step)


def test_a_delta_is_small_and_a_snapshot_follows_every_so_many_versions(
    tmp_path: Path, store: WeightsStore, clean_environment: pytest.MonkeyPatch
) -> None:
    model, publisher = Tied(), Publisher(make_recipe(tmp_path, snapshot_every=3, keep_snapshots=9), store)
    for step in range(8):
        publisher.publish(model, version(step))
        model.change(step)
    whole = [f"1.{step} snapshot" for step in (0, 3, 6)]
    assert [kind for kind in kinds(store) if "snapshot" in kind] == whole
    assert [kind for kind in kinds(store) if "delta" in kind] == [f"1.{step} delta" for step in range(1, 8)]
    deltas = [m.size_bytes for m in store.manifests() if m.kind is WeightsKind.DELTA]
    assert max(deltas) < 0.2 * store.manifests()[0].size_bytes


def test_an_announcement_that_cannot_be_read_is_mended(tmp_path: Path, clean_environment: pytest.MonkeyPatch) -> None:
    model, store = Tied(), WeightsStore(tmp_path / "weights")
    publisher = Publisher(make_recipe(tmp_path), store)
    first = publisher.publish(model, version(0))
    for spoil in ("", '{"oops'):
        (tmp_path / "weights" / "HEAD").write_text(spoil)
        assert publisher.needs_snapshot() and publisher.mend().weights_id == first.weights_id
        assert store.head() == first and not publisher.needs_snapshot()
    (tmp_path / "weights" / "HEAD").write_text("rubbish")
    model.change(1)
    assert publisher.publish(model, version(1)) == store.head()


def test_what_was_announced_before_the_disk_was_full_is_not_published_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_environment: pytest.MonkeyPatch
) -> None:
    model, store = Tied(), WeightsStore(tmp_path / "weights")
    publisher = Publisher(make_recipe(tmp_path), store)
    publisher.publish(model, version(0))
    model.change(1)
    publisher.encode(model, version(1))

    def full(keep_snapshots: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "prune", full)
    with pytest.raises(OSError, match="No space left"):
        publisher.announce()
    announced, listed = store.head(), store.manifests()
    monkeypatch.undo()
    assert publisher.announce() == announced
    assert store.manifests() == listed and announced is not None and announced.kind is WeightsKind.DELTA


def test_a_newcomer_reads_one_snapshot_and_the_deltas_after_it(
    tmp_path: Path, store: WeightsStore, clean_environment: pytest.MonkeyPatch
) -> None:
    model, publisher = Tied(), Publisher(make_recipe(tmp_path, snapshot_every=10), store)
    for step in range(49):
        model.change(step)
        manifest = publisher.publish(model, version(step))
    mirror = Mirror(tmp_path / "mirror")
    assert bring(mirror, store, manifest) == [HopKind.SNAPSHOT, *[HopKind.APPLY] * 8], "1.40 and what follows it"
    assert holds(mirror, expected(model, "float32"))


def test_a_restarted_trainer_publishes_nothing_but_a_name_and_replicas_that_ran_ahead_come_back(
    tmp_path: Path, store: WeightsStore, clean_environment: pytest.MonkeyPatch
) -> None:
    recipe, model, mirror = make_recipe(tmp_path), Tied(), Mirror(tmp_path / "mirror")
    publisher = Publisher(recipe, store)
    publisher.publish(model, version(0))
    checkpointed = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for step in (1, 2):
        model.change(step)
        ahead = publisher.publish(model, version(step))
    bring(mirror, store, ahead)
    model.load_state_dict(checkpointed)
    again = Publisher(recipe, store).publish(model, version(0, incarnation=2))
    assert again.kind is WeightsKind.DELTA and again.size_bytes < 500
    assert bring(mirror, store, again) == [HopKind.UNDO, HopKind.UNDO, HopKind.RENAME]
    assert holds(mirror, expected(model, "float32"))


def test_weights_that_change_altogether_are_published_as_a_snapshot(
    tmp_path: Path, store: WeightsStore, clean_environment: pytest.MonkeyPatch
) -> None:
    model, publisher = Tied(), Publisher(make_recipe(tmp_path), store)
    publisher.publish(model, version(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * torch.exp(10 * torch.randn(parameter.shape)))
    manifest = publisher.publish(model, version(1))
    assert manifest.kind is WeightsKind.SNAPSHOT or manifest.size_bytes < store.manifests()[0].size_bytes
    mirror = Mirror(tmp_path / "mirror")
    bring(mirror, store, manifest)
    assert holds(mirror, expected(model, "float32"))


def test_the_weights_may_change_as_soon_as_they_are_encoded(
    tmp_path: Path, store: WeightsStore, clean_environment: pytest.MonkeyPatch
) -> None:
    model, publisher, mirror = Tied(), Publisher(make_recipe(tmp_path), store), Mirror(tmp_path / "mirror")
    for step in (0, 1):
        model.change(step)
        encoded = expected(model, "float32")
        publisher.encode(model, version(step))
        model.change(7, size=1.0)
        bring(mirror, store, publisher.announce())
        assert holds(mirror, encoded)


def test_a_disk_that_is_full_while_a_delta_is_written_costs_a_snapshot_and_nothing_else(
    tmp_path: Path, store: WeightsStore, monkeypatch: pytest.MonkeyPatch, clean_environment: pytest.MonkeyPatch
) -> None:
    model, publisher, mirror = Tied(), Publisher(make_recipe(tmp_path), store), Mirror(tmp_path / "mirror")
    publisher.publish(model, version(0))
    model.change(1)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mars_trainer.publish.DeltaWriter.add", full)
        publisher.encode(model, version(1))
        patch.setattr("mars_trainer.publish.write_tensors", full)
        with pytest.raises(OSError, match="No space"):
            publisher.announce()
    assert kinds(store) == ["1.0 snapshot"]
    manifest = publisher.announce()
    assert kinds(store) == ["1.0 snapshot", "1.1 snapshot"]
    assert not list(store.root.glob(".staged-*"))
    bring(mirror, store, manifest)
    assert holds(mirror, expected(model, "float32"))
    model.change(2)
    assert publisher.publish(model, version(2)).kind is WeightsKind.DELTA


def test_an_encoding_that_failed_is_followed_by_a_snapshot(
    tmp_path: Path, store: WeightsStore, monkeypatch: pytest.MonkeyPatch, clean_environment: pytest.MonkeyPatch
) -> None:
    model, publisher = Tied(), Publisher(make_recipe(tmp_path), store)
    publisher.publish(model, version(0))
    model.change(1)

    def broken(self: StagedDelta, *_: Any) -> None:
        raise RuntimeError("the graphics card fell off")

    with monkeypatch.context() as patch:
        patch.setattr(StagedDelta, "add", broken)
        with pytest.raises(RuntimeError):
            publisher.encode(model, version(1))
    with pytest.raises(NotReadyError, match="no version is encoded"):
        publisher.announce()
    mirror = Mirror(tmp_path / "mirror")
    bring(mirror, store, publisher.publish(model, version(1)))
    assert holds(mirror, expected(model, "float32"))


def test_what_no_reader_can_reach_is_published_again_as_a_snapshot(
    tmp_path: Path, store: WeightsStore, clean_environment: pytest.MonkeyPatch
) -> None:
    model, publisher, mirror = Tied(), Publisher(make_recipe(tmp_path), store), Mirror(tmp_path / "mirror")
    for step in (0, 1):
        model.change(step)
        head = publisher.publish(model, version(step))
    assert not publisher.needs_snapshot()
    store.complain(head)
    assert publisher.needs_snapshot()
    mended = publisher.mend()
    assert mended.kind is WeightsKind.SNAPSHOT and mended.weights_id == head.weights_id
    assert not publisher.needs_snapshot()
    assert bring(mirror, store, mended) == [HopKind.SNAPSHOT]
    assert holds(mirror, expected(model, "float32"))
