"""The weights store: published versions are whole, verified and announced last."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from blake3 import blake3

from mars_shared.contracts import WeightManifest, WeightsKind
from mars_shared.errors import FencedError, IntegrityError
from mars_shared.weights import COMPLAINT, WeightsStore, describe_file
from weights_builders import DELTA_FILE, publish_delta, publish_snapshot, weights


@pytest.fixture
def store(tmp_path: Path) -> WeightsStore:
    return WeightsStore(tmp_path / "weights")


def publish(store: WeightsStore, step: int, *, incarnation: int = 1, content: bytes = b"tensors") -> WeightManifest:
    staged = store.stage()
    (staged / "model.safetensors").write_bytes(content)
    (staged / "extra.bin").write_bytes(b"")
    identity = weights(step, incarnation=incarnation, content=content)
    return store.publish(staged, identity=identity, kind=WeightsKind.SNAPSHOT)


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
    assert store.manifests() == [manifest]
    assert snapshots(tmp_path) == ["1.0"]


def test_the_head_is_the_last_published_version(store: WeightsStore) -> None:
    publish(store, 0)
    second = publish(store, 1)
    assert store.head() == second


def test_the_same_weights_of_another_version_are_another_snapshot(store: WeightsStore) -> None:
    assert publish(store, 0).weights_id != publish(store, 1).weights_id


def test_publishing_the_same_again_leaves_what_stands_and_leaves_nothing_behind(store: WeightsStore, tmp_path: Path) -> None:
    first = publish(store, 0)
    before = (store.folder(first) / "model.safetensors").stat()
    assert publish(store, 0) == first
    after = (store.folder(first) / "model.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert snapshots(tmp_path) == ["1.0"]


def test_a_whole_publication_is_immutable_even_if_other_bytes_are_published_for_the_same_weights(store: WeightsStore) -> None:
    base = publish(store, 0)
    first = publish_delta(store, weights(1), base, b"packed")
    second = publish_delta(store, weights(1), base, b"packed otherwise")
    assert second == first == store.head()
    assert (store.verify(first) / DELTA_FILE).read_bytes() == b"packed"


@pytest.mark.parametrize("damaged", ["model.safetensors", "manifest.json"])
def test_publishing_again_replaces_a_damaged_publication(store: WeightsStore, tmp_path: Path, damaged: str) -> None:
    first = publish(store, 0)
    (store.folder(first) / damaged).write_bytes(b"rubbish")
    assert publish(store, 0) == first
    store.verify(first)
    assert store.manifests() == [first]
    assert snapshots(tmp_path) == ["1.0"]


def test_a_version_may_be_reached_by_a_delta_and_by_a_snapshot_of_it_that_comes_later(store: WeightsStore) -> None:
    base = publish(store, 0)
    delta = publish_delta(store, weights(1), base, invertible=True)
    assert (delta.kind, delta.base, delta.invertible) == (WeightsKind.DELTA, base.identity, True)
    snapshot = publish_snapshot(store, weights(1), announce=False)
    assert store.head() == delta, "a further publication does not touch HEAD"
    assert snapshot.weights_id == delta.weights_id
    assert store.manifests() == [base, delta, snapshot]


def test_a_folder_whose_manifest_is_missing_unreadable_or_of_another_is_left_out_and_logged(
    store: WeightsStore, caplog: pytest.LogCaptureFixture
) -> None:
    missing, rubbish, swapped, whole = (publish(store, step) for step in range(4))
    (store.folder(missing) / "manifest.json").unlink()
    (store.folder(rubbish) / "manifest.json").write_bytes(b"{}")
    (store.folder(swapped) / "manifest.json").write_text(whole.model_dump_json())
    assert store.manifests() == [whole]
    for manifest, why in (
        (missing, "has no manifest.json"),
        (rubbish, "not a weight manifest"),
        (swapped, "holds the manifest of"),
    ):
        assert any(manifest.folder_name in line and why in line for line in caplog.messages)


def test_a_complaint_about_a_damaged_snapshot_stands_until_it_is_published_again(store: WeightsStore, tmp_path: Path) -> None:
    manifest = publish(store, 3)
    file = store.folder(manifest) / "model.safetensors"
    whole = file.read_bytes()
    assert not store.needs_snapshot()
    file.write_bytes(b"rubbish")
    assert not store.needs_snapshot(), "nobody has complained"
    store.complain(manifest)
    assert store.needs_snapshot()
    assert publish(store, 3) == manifest
    store.verify(manifest)
    assert file.read_bytes() == whole and not store.needs_snapshot()
    store.complain(manifest)
    assert not store.needs_snapshot(), "a complaint without a reason is dropped"
    assert not (tmp_path / "weights" / COMPLAINT).exists()
    assert snapshots(tmp_path) == ["1.3"]


def test_a_complaint_asks_for_a_snapshot_where_there_is_a_delta_alone(store: WeightsStore) -> None:
    head = publish_delta(store, weights(1), publish(store, 0))
    assert not store.needs_snapshot()
    store.complain(head)
    assert store.needs_snapshot()
    snapshot = publish_snapshot(store, weights(1), announce=False)
    assert not store.needs_snapshot()
    (store.folder(snapshot) / "manifest.json").write_bytes(b"rubbish")
    store.complain(head)
    assert store.needs_snapshot(), "readers do not see a snapshot without a manifest"


def test_a_complaint_about_weights_that_are_no_more_announced_is_dropped(store: WeightsStore) -> None:
    old = publish_delta(store, weights(1), publish(store, 0))
    store.complain(old)
    head = publish_delta(store, weights(2), old)
    assert not store.needs_snapshot()
    store.complain(old)
    assert not store.needs_snapshot()
    store.complain(head)
    store.complain(old)  # by a laggard, which must not hide the other
    assert store.needs_snapshot()


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
    store.prune(keep_snapshots=2)
    assert [name for name in snapshots(tmp_path) if not name.startswith(".")] == ["1.2", "1.3"]
