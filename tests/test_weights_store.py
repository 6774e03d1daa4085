"""The weights store: published versions are whole, verified and announced last."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file
from torch import nn

from mars_shared.contracts import PolicyVersion, WeightManifest
from mars_shared.errors import FencedError, IntegrityError
from mars_shared.settings import Recipe
from mars_shared.weights import WeightsStore, describe_file
from mars_trainer.publish import WEIGHTS_FILE, Publisher, model_fingerprint, policy_tensors


@pytest.fixture
def store(tmp_path: Path) -> WeightsStore:
    return WeightsStore(tmp_path / "weights")


def publish(store: WeightsStore, step: int, *, incarnation: int = 1, content: bytes = b"tensors") -> WeightManifest:
    staged = store.stage()
    (staged / "model.safetensors").write_bytes(content)
    (staged / "extra.bin").write_bytes(b"")
    version = PolicyVersion(incarnation=incarnation, step=step)
    return store.publish(staged, run="r", version=version, model="m", dtype="float32")


def snapshots(tmp_path: Path) -> list[str]:
    return sorted(path.name.split("-")[0] for path in (tmp_path / "weights").iterdir() if path.is_dir())


def test_a_file_is_described_by_size_and_hash(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"abc")
    file = describe_file(tmp_path / "a.bin")
    assert (file.name, file.size_bytes, file.blake3) == ("a.bin", 3, blake3(b"abc").hexdigest())


def test_before_the_first_version_there_is_no_head(store: WeightsStore) -> None:
    assert store.head() is None


def test_a_published_version_is_announced_whole_and_verified(store: WeightsStore, tmp_path: Path) -> None:
    manifest = publish(store, 0)
    assert WeightsStore(tmp_path / "weights").head() == manifest
    folder = store.verify(manifest)
    assert folder == store.folder(manifest)
    assert (folder / "model.safetensors").read_bytes() == b"tensors"
    assert WeightManifest.model_validate_json((folder / "manifest.json").read_bytes()) == manifest
    assert {file.name for file in manifest.files} == {"model.safetensors", "extra.bin"}
    assert snapshots(tmp_path) == ["1.0"]


def test_the_head_is_the_last_published_version(store: WeightsStore) -> None:
    publish(store, 0)
    second = publish(store, 1)
    assert store.head() == second


def test_the_same_weights_of_another_version_are_another_snapshot(store: WeightsStore) -> None:
    assert publish(store, 0).weights_id != publish(store, 1).weights_id


def test_publishing_the_same_version_again_changes_nothing(store: WeightsStore, tmp_path: Path) -> None:
    first = publish(store, 0)
    assert publish(store, 0) == first
    assert snapshots(tmp_path) == ["1.0"]
    store.verify(first)


def test_a_complaint_about_a_damaged_snapshot_stands_until_it_is_published_again(store: WeightsStore, tmp_path: Path) -> None:
    manifest = publish(store, 3)
    file = store.folder(manifest) / "model.safetensors"
    whole = file.read_bytes()
    assert not store.is_damaged()
    file.write_bytes(b"rubbish")
    assert not store.is_damaged(), "nobody has complained"
    store.complain(manifest)
    assert store.is_damaged()
    assert publish(store, 3) == manifest
    store.verify(manifest)
    assert file.read_bytes() == whole and not store.is_damaged()
    store.complain(manifest)
    assert not store.is_damaged(), "a complaint without a reason is dropped"
    assert snapshots(tmp_path) == ["1.3"]


@pytest.mark.parametrize("content", [b"", b"tensor", b"tensorz", b"tensors "])
def test_a_changed_or_truncated_file_is_refused_and_named(store: WeightsStore, content: bytes) -> None:
    manifest = publish(store, 3)
    (store.folder(manifest) / "model.safetensors").write_bytes(content)
    with pytest.raises(IntegrityError, match=rf"weights 1.3: .*model.safetensors has {len(content)} bytes.*expected 7"):
        store.verify(manifest)


def test_every_file_is_checked_and_not_only_the_first(store: WeightsStore) -> None:
    manifest = publish(store, 0)
    for file in manifest.files:
        folder = store.folder(manifest)
        before = (folder / file.name).read_bytes()
        (folder / file.name).write_bytes(before + b"x")
        with pytest.raises(IntegrityError, match=file.name):
            store.verify(manifest)
        (folder / file.name).write_bytes(before)
    store.verify(manifest)


def test_a_missing_file_or_folder_is_named(store: WeightsStore) -> None:
    manifest = publish(store, 0)
    (store.folder(manifest) / "model.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"model.safetensors is missing"):
        store.verify(manifest)
    shutil.rmtree(store.folder(manifest))
    with pytest.raises(IntegrityError, match="is missing"):
        store.verify(manifest)


@pytest.mark.parametrize("text", [b"", b"{}", b"1.0", b"\xff"])
def test_a_damaged_head_is_an_error_that_names_the_file(store: WeightsStore, tmp_path: Path, text: bytes) -> None:
    publish(store, 0)
    (tmp_path / "weights" / "HEAD").write_bytes(text)
    with pytest.raises(IntegrityError, match="HEAD: not a weight manifest"):
        store.head()


def test_an_older_incarnation_publishes_nothing(store: WeightsStore, tmp_path: Path) -> None:
    publish(store, 9, incarnation=1)
    head = publish(store, 2, incarnation=2)
    with pytest.raises(
        FencedError, match=r"weights 1\.10 are not published.*HEAD announces 2\.2: another trainer has taken over"
    ):
        publish(store, 10, incarnation=1)
    assert store.head() == head
    assert snapshots(tmp_path) == ["1.9", "2.2"]
    publish(store, 1, incarnation=2)


def test_pruning_keeps_the_newest_in_the_order_of_versions(store: WeightsStore, tmp_path: Path) -> None:
    for incarnation, step in ((1, 9), (1, 10), (1, 11), (2, 2)):
        publish(store, step, incarnation=incarnation)
    store.prune(keep=2)
    assert snapshots(tmp_path) == ["1.11", "2.2"]


def test_pruning_spares_the_head(store: WeightsStore, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        publish(store, step)
    rolled_back = publish(store, 0, content=b"others")  # HEAD need not be the highest version
    store.prune(keep=1)
    assert snapshots(tmp_path) == ["1.0", "1.3"]
    store.verify(rolled_back)


def test_pruning_fewer_than_are_kept_removes_nothing(store: WeightsStore, tmp_path: Path) -> None:
    publish(store, 0)
    store.prune(keep=4)
    assert snapshots(tmp_path) == ["1.0"]


@pytest.mark.parametrize("manifest_written", [False, True])
def test_what_a_trainer_killed_in_mid_publication_left_behind_disturbs_nobody(
    store: WeightsStore, tmp_path: Path, manifest_written: bool
) -> None:
    first = publish(store, 0)
    staged = store.stage()
    (staged / "model.safetensors").write_bytes(b"half")
    if manifest_written:
        (staged / "manifest.json").write_text(first.model_dump_json())
    assert store.head() == first
    for step in (1, 2, 3):
        publish(store, step)
    store.prune(keep=2)
    assert [name for name in snapshots(tmp_path) if not name.startswith(".")] == ["1.2", "1.3"]


class Tied(nn.Module):
    """Two layers that share one weight, as a policy shares its embedding with its head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.randn(4, 3).T)


def test_tied_weights_are_published_once_and_all_are_contiguous() -> None:
    tensors = policy_tensors(Tied(), torch.bfloat16)
    assert set(tensors) == {"embed.weight", "scale"}
    assert all(t.is_contiguous() and t.dtype is torch.bfloat16 and not t.requires_grad for t in tensors.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_publisher_writes_the_policy_in_the_dtype_of_replicas(
    tmp_path: Path, dtype: str, clean_environment: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "tied"}')
    recipe = Recipe.model_validate(
        {
            "run": {"name": "r", "dir": tmp_path},
            "model": {"path": tmp_path / "model", "dtype": dtype, "max_model_len": 64},
            "data": {"dataset": "digits"},
            "rollout": {"num_generations": 2, "max_completion_length": 8},
            "train": {"steps": 1, "prompts_per_step": 1, "learning_rate": 1e-3, "keep_snapshots": 2},
        }
    )
    store, model = WeightsStore(tmp_path / "weights"), Tied()
    for step in range(4):
        manifest = Publisher(recipe, store).publish(model, PolicyVersion(incarnation=1, step=step))
    assert store.head() == manifest
    assert (manifest.run, manifest.dtype) == ("r", dtype)
    assert manifest.model == model_fingerprint(tmp_path / "model") == hashlib.sha256(b'{"model_type": "tied"}').hexdigest()
    tensors = load_file(store.verify(manifest) / WEIGHTS_FILE)
    assert torch.equal(tensors["embed.weight"], model.embed.weight.to(getattr(torch, dtype)))
    assert snapshots(tmp_path) == ["1.2", "1.3"]
