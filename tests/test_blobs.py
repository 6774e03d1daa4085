"""The blob store: content by hash, verified whenever it is read."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from mars_shared.blobs import BlobStore
from mars_shared.errors import BlobMissingError, InputError, IntegrityError


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def file_of(store: BlobStore, name: str, root: Path) -> Path:
    (path,) = (root / "blobs").rglob(name)
    return path


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_the_name_of_bytes_is_their_blake3_hash(store: BlobStore) -> None:
    # The hash of nothing is in blake3's own test vectors.
    assert store.put(b"") == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert store.get(store.put(b"abc")) == b"abc"


@given(data=st.binary())
def test_what_is_put_comes_back(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    store = BlobStore(tmp_path_factory.getbasetemp() / "property-blobs")
    assert store.get(store.put(data)) == data and store.contains(blake3(data).hexdigest())


def test_putting_twice_keeps_one_file(store: BlobStore, tmp_path: Path) -> None:
    assert store.put(b"abc") == store.put(b"abc")
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_another_store_on_the_same_folder_sees_it(store: BlobStore, tmp_path: Path) -> None:
    assert BlobStore(tmp_path / "blobs").get(store.put(b"abc")) == b"abc"


def test_a_hash_that_nobody_put_is_missing_and_named(store: BlobStore) -> None:
    with pytest.raises(BlobMissingError, match="blob " + "ab" * 32):
        store.get("ab" * 32)
    assert not store.contains("ab" * 32)


@pytest.mark.parametrize("name", ["", "abc", "AB" * 32, "../../etc/passwd", "ab" * 32 + "\n", "ab" * 31 + "/x", "x" * 10**5])
def test_a_name_that_is_no_hash_is_refused(store: BlobStore, name: str) -> None:
    with pytest.raises(InputError, match="not a blake3 hash; expected 64") as caught:
        store.get(name)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("damage", [b"", b"ab", b"abd", b"abcd"])
def test_damaged_bytes_are_never_returned(store: BlobStore, tmp_path: Path, damage: bytes) -> None:
    name = store.put(b"abc")
    path = file_of(store, name, tmp_path)
    path.write_bytes(damage)
    with pytest.raises(IntegrityError, match=f"blob {name}: .*{blake3(damage).hexdigest()}"):
        store.get(name)


def test_putting_bytes_again_mends_a_file_that_a_power_cut_tore(store: BlobStore, tmp_path: Path) -> None:
    # Blobs are not synced to the disk one by one, so a file may come back empty: the next put must write it again.
    name = store.put(b"abc")
    file_of(store, name, tmp_path).write_bytes(b"")
    assert store.put(b"abc") == name
    assert store.get(name) == b"abc"


def test_an_upload_is_read_like_any_blob(store: BlobStore) -> None:
    assert store.get(store.put_upload(b"abc")) == b"abc"


def test_uploads_expire_and_training_blobs_stay(store: BlobStore, tmp_path: Path) -> None:
    kept, old, fresh = store.put(b"kept"), store.put_upload(b"old"), store.put_upload(b"fresh")
    age(file_of(store, kept, tmp_path), 100)
    age(file_of(store, old, tmp_path), 100)
    assert store.sweep_uploads(ttl_s=60) == 1
    assert store.contains(kept) and store.contains(fresh) and not store.contains(old)
    assert store.sweep_uploads(ttl_s=60) == 0


def test_an_upload_that_comes_again_lives_on(store: BlobStore, tmp_path: Path) -> None:
    name = store.put_upload(b"abc")
    age(file_of(store, name, tmp_path), 100)
    store.put_upload(b"abc")
    assert store.sweep_uploads(ttl_s=60) == 0


def test_a_blob_that_is_also_an_upload_survives_its_expiry(store: BlobStore, tmp_path: Path) -> None:
    name = store.put_upload(b"abc")
    age(file_of(store, name, tmp_path), 100)
    store.put(b"abc")
    store.sweep_uploads(ttl_s=60)
    assert store.get(name) == b"abc"


def test_two_replicas_may_sweep_the_same_store(store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [store.put_upload(bytes([i])) for i in range(3)]
    for name in names:
        age(file_of(store, name, tmp_path), 100)
    listed = Path.glob

    def glob_while_another_sweeps(self: Path, pattern: str) -> list[Path]:
        found = list(listed(self, pattern))
        found[0].unlink()
        return found

    monkeypatch.setattr(Path, "glob", glob_while_another_sweeps)
    assert store.sweep_uploads(ttl_s=60) == 2
