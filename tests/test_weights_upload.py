"""The trainer's copy of the weights store behind an fsspec URL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mars_shared.errors import ConfigError, FencedError, WeightsUnavailableError
from mars_shared.weights import WeightsStore, open_source
from mars_shared.weights.source_fsspec import FsspecSource
from mars_trainer import upload as upload_module
from mars_trainer.upload import Uploaded, Uploader
from weights_builders import SNAPSHOT_FILE, listed, publish_delta, publish_snapshot, weights


@pytest.fixture
def store(tmp_path: Path) -> WeightsStore:
    return WeightsStore(tmp_path / "store")


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    return tmp_path / "remote"


@pytest.fixture
def uploader(store: WeightsStore, remote: Path) -> Uploader:
    return Uploader(store, f"file://{remote}")


@pytest.fixture
def source(remote: Path, tmp_path: Path) -> FsspecSource:
    source = open_source(f"file://{remote}", tmp_path)
    assert isinstance(source, FsspecSource)
    return source


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_empty_store_uploads_nothing(uploader: Uploader, remote: Path) -> None:
    assert uploader.upload() == Uploaded((), (), 0)
    assert not remote.exists()


def test_the_copy_has_the_same_files_as_the_store(store: WeightsStore, uploader: Uploader, remote: Path, tmp_path: Path) -> None:
    base = publish_snapshot(store, weights(0))
    delta = publish_delta(store, weights(1), base)
    # "tensors" is 7 bytes, "steps" 5.
    assert uploader.upload() == Uploaded((base.folder_name, delta.folder_name), (), 12)
    assert files(remote) == files(tmp_path / "store")
    publish_snapshot(store, weights(2))
    store.prune(keep_snapshots=1)
    assert uploader.upload().removed == (base.folder_name, delta.folder_name)
    assert files(remote) == files(tmp_path / "store")
    assert sorted(path.name for path in remote.iterdir()) == sorted(path.name for path in (tmp_path / "store").iterdir())


def test_uploading_again_carries_nothing_even_from_another_process(store: WeightsStore, uploader: Uploader, remote: Path) -> None:
    publish_snapshot(store, weights(0))
    uploader.upload()
    before = {path: path.stat().st_mtime_ns for path in remote.rglob("*")}
    assert uploader.upload() == Uploader(store, f"file://{remote}").upload() == Uploaded((), (), 0)
    assert {path: path.stat().st_mtime_ns for path in remote.rglob("*")} == before


def test_an_upload_that_was_cut_off_announces_nothing_and_is_gone_on_with(
    store: WeightsStore, uploader: Uploader, remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = publish_snapshot(store, weights(0))
    uploader.upload()
    head = (remote / "HEAD").read_bytes()
    delta = publish_delta(store, weights(1), base)
    publish_snapshot(store, weights(1), announce=False)
    write = uploader._remote.write

    def cut_off(name: str, content: bytes) -> None:
        if name.startswith(delta.folder_name):
            raise WeightsUnavailableError("cut off")
        write(name, content)

    monkeypatch.setattr(uploader._remote, "write", cut_off)
    with pytest.raises(WeightsUnavailableError):
        uploader.upload()
    assert (remote / "HEAD").read_bytes() == head
    assert (remote / delta.folder_name / "delta.mars").exists(), "it was cut off before the manifest"
    monkeypatch.undo()
    assert uploader.upload().added == tuple(manifest.folder_name for manifest in store.manifests()[1:])
    assert files(remote) == files(tmp_path / "store")


def test_a_version_is_announced_before_its_snapshot_is_carried(
    store: WeightsStore, uploader: Uploader, remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = publish_snapshot(store, weights(0))
    uploader.upload()
    delta = publish_delta(store, weights(1), base)
    publish_snapshot(store, weights(1), announce=False)
    upload, announced = uploader._remote.upload, {}

    def noting(file: Path, name: str) -> None:
        announced[name] = (remote / "HEAD").read_text()
        upload(file, name)

    monkeypatch.setattr(uploader._remote, "upload", noting)
    uploader.upload()
    before, after = base.model_dump_json(), delta.model_dump_json()
    assert list(announced.values()) == [before, after]


def test_a_publication_that_is_damaged_in_the_store_is_not_uploaded_and_complained_about(
    store: WeightsStore, uploader: Uploader, remote: Path
) -> None:
    manifest = publish_snapshot(store, weights(0))
    (store.folder(manifest) / SNAPSHOT_FILE).write_bytes(b"rubbish")
    assert uploader.upload() == Uploaded((), (), 0)
    assert not (remote / "HEAD").exists(), "what nobody can reach is not announced"
    assert store.needs_snapshot()
    publish_snapshot(store, weights(0))
    assert uploader.upload().added == (manifest.folder_name,)
    assert (remote / "HEAD").read_text() == manifest.model_dump_json()


async def test_a_copy_that_a_reader_complains_about_is_uploaded_again(
    store: WeightsStore, uploader: Uploader, remote: Path, source: FsspecSource
) -> None:
    manifest = publish_snapshot(store, weights(0))
    uploader.upload()
    (remote / manifest.folder_name / SNAPSHOT_FILE).write_bytes(b"rubbish")
    uploader.collect()
    assert uploader.upload() == Uploaded((), (), 0), "nobody has complained"
    await source.complain(manifest)
    uploader.collect()
    assert not store.needs_snapshot(), "the store's own is whole"
    assert uploader.upload().added == (manifest.folder_name,)
    assert (remote / manifest.folder_name / SNAPSHOT_FILE).read_bytes() == b"tensors"
    uploader.collect()
    assert uploader.upload() == Uploaded((), (), 0), "a complaint is heard once"


async def test_a_reader_lives_as_long_as_it_renews_its_registration(
    store: WeightsStore, uploader: Uploader, remote: Path, tmp_path: Path, source: FsspecSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = publish_snapshot(store, weights(0))
    for step in (1, 2):
        base = publish_delta(store, weights(step), base, b"d")
    publish_snapshot(store, weights(2), announce=False)
    registration = tmp_path / "store" / "readers" / "rollout-0.json"
    for _ in range(2):
        await source.register("rollout-0", weights(0).weights_id)
        uploader.collect()
        assert registration.exists()
        registration.unlink()
    uploader.collect()
    assert not registration.exists(), "it said nothing since"
    monkeypatch.setattr(upload_module, "READER_S", -1.0)
    uploader.collect()
    assert list((remote / "readers").iterdir()) == []
    await source.register("rollout-0", weights(0).weights_id)
    uploader.collect()
    store.prune(keep_snapshots=1)
    assert listed(store) == ["1.1 delta", "1.2 delta", "1.2 snapshot"]


@pytest.mark.parametrize(("name", "content"), [("a.json", b"{"), (" .json", b'{"weights_id": null}')])
def test_what_is_no_registration_is_passed_over(
    store: WeightsStore, uploader: Uploader, remote: Path, caplog: pytest.LogCaptureFixture, name: str, content: bytes
) -> None:
    publish_snapshot(store, weights(0))
    uploader.upload()
    (remote / "readers").mkdir()
    (remote / "readers" / name).write_bytes(content)
    uploader.collect()
    assert any("is no registration of a reader" in line for line in caplog.messages)


def test_the_weights_of_another_run_are_left_alone(store: WeightsStore, uploader: Uploader, remote: Path, tmp_path: Path) -> None:
    other = WeightsStore(tmp_path / "other")
    publish_snapshot(other, weights(0, run="other"))
    Uploader(other, f"file://{remote}").upload()
    before = files(remote)
    publish_snapshot(store, weights(0))
    with pytest.raises(ConfigError, match="holds the weights of run 'other', not 'r'; give each run a URL of its own"):
        uploader.upload()
    assert files(remote) == before


def test_an_announcement_that_cannot_be_read_is_written_anew(store: WeightsStore, uploader: Uploader, remote: Path) -> None:
    manifest = publish_snapshot(store, weights(0))
    uploader.upload()
    (remote / "HEAD").write_text('{"oops')
    assert uploader.upload() == Uploaded((), (), 0)
    assert (remote / "HEAD").read_text() == manifest.model_dump_json()


def test_an_older_incarnation_uploads_and_removes_nothing(
    store: WeightsStore, uploader: Uploader, remote: Path, tmp_path: Path
) -> None:
    newer = WeightsStore(tmp_path / "newer")
    publish_snapshot(newer, weights(3, incarnation=2))
    Uploader(newer, f"file://{remote}").upload()
    before = files(remote)
    publish_snapshot(store, weights(9))
    with pytest.raises(FencedError, match=r"weights 1\.9 are not uploaded.*announces 2\.3: another trainer has taken over"):
        uploader.upload()
    assert files(remote) == before


def test_a_store_that_forbids_is_an_error_of_the_configuration(
    store: WeightsStore, uploader: Uploader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise PermissionError("Access Denied")

    publish_snapshot(store, weights(0))
    monkeypatch.setattr(uploader._remote._fs, "pipe_file", forbidden)
    with pytest.raises(ConfigError, match=r"is forbidden \(Access Denied\); check the credentials"):
        uploader.upload()
