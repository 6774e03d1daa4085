"""Checkpoints are whole or refused; the newest whole one of the right run and model is taken."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from mars_shared.contracts import PolicyVersion
from mars_shared.errors import CheckpointError, IntegrityError
from mars_trainer.checkpoint import Checkpoint, CheckpointStore, Ledger, load_checkpoint, model_identity

MODEL = "a" * 64
FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "hashes.json")


def checkpoint(step: int, **ledger: Any) -> Checkpoint:
    torch.manual_seed(step)
    fields = {
        "run": "r",
        "model": MODEL,
        "version": PolicyVersion(incarnation=2, step=step),
        "next_dispatch_index": 24 * step,
        "consumed": tuple((2 * i, 2 * i + 1) for i in range(step)),
        "dead": (5,),
    }
    return Checkpoint(
        ledger=Ledger(**fields | ledger),
        model={"embed.weight": torch.randn(3, 2), "bias": torch.tensor([float(step)])},
        optimizer={"rng": torch.get_rng_state(), "bias/exp_avg": torch.randn(1), "bias/step": torch.tensor(float(step))},
    )


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def steps_of(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "checkpoints").iterdir()}


def newest(store: CheckpointStore) -> Checkpoint:
    found = store.load_newest(run="r", model=MODEL)
    assert found is not None
    return found


def test_what_was_saved_comes_back_bit_by_bit(store: CheckpointStore) -> None:
    saved = checkpoint(3)
    folder = store.save(saved)
    assert folder.name == "step_3"
    loaded = newest(store)
    assert loaded.ledger == saved.ledger
    for before, after in ((saved.model, loaded.model), (saved.optimizer, loaded.optimizer)):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


def test_before_the_first_there_is_none(store: CheckpointStore) -> None:
    assert store.load_newest(run="r", model=MODEL) is None


def test_the_newest_is_the_one_of_the_highest_step(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=9)
    for step in (9, 100, 20):
        store.save(checkpoint(step))
    assert newest(store).ledger.version.step == 100


def test_only_the_newest_are_kept(store: CheckpointStore, tmp_path: Path) -> None:
    for step in (8, 9, 10):
        store.save(checkpoint(step))
    assert steps_of(tmp_path) == {"step_9", "step_10"}


def test_saving_a_step_again_replaces_it(store: CheckpointStore, tmp_path: Path) -> None:
    store.save(checkpoint(1))
    store.save(checkpoint(1, next_dispatch_index=99))
    assert newest(store).ledger.next_dispatch_index == 99
    assert steps_of(tmp_path) == {"step_1"}


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_anywhere_is_noticed(store: CheckpointStore, name: str) -> None:
    folder = store.save(checkpoint(1))
    path = folder / name
    whole = path.read_bytes()
    stride = max(1, len(whole) // 150)
    for position in range(0, len(whole), stride):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(IntegrityError):
            load_checkpoint(folder)
    path.write_bytes(whole)
    load_checkpoint(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_missing_file_is_refused_and_named(store: CheckpointStore, name: str) -> None:
    folder = store.save(checkpoint(1))
    path = folder / name
    whole = path.read_bytes()
    for content in (b"", whole[:-1], whole + b"\0"):
        path.write_bytes(content)
        with pytest.raises(IntegrityError, match=name):
            load_checkpoint(folder)
    path.unlink()
    with pytest.raises(IntegrityError, match=rf"{name}.*missing"):
        load_checkpoint(folder)


def test_a_list_of_hashes_that_leaves_files_out_is_refused(store: CheckpointStore) -> None:
    folder = store.save(checkpoint(1))
    (folder / "hashes.json").write_text("[]")
    with pytest.raises(IntegrityError, match=r"model.safetensors|hashes.json"):
        load_checkpoint(folder)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.save(checkpoint(10))
    (store.save(checkpoint(20)) / "model.safetensors").write_bytes(b"")
    with caplog.at_level(logging.ERROR):
        assert newest(store).ledger.version.step == 10
    assert "step_20/model.safetensors" in caplog.text


def test_checkpoints_of_another_model_or_run_are_named_and_the_one_before_them_taken(
    store: CheckpointStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step, fields in ((10, {}), (20, {"model": "b" * 64}), (30, {"run": "other"})):
        CheckpointStore(tmp_path / "checkpoints", keep=9).save(checkpoint(step, **fields))
    with caplog.at_level(logging.ERROR):
        assert newest(store).ledger.version.step == 10
    assert "step_20: began from another model" in caplog.text and "step_30: belongs to run 'other'" in caplog.text


@pytest.mark.parametrize("name", ["before the rename", "after it"])
def test_a_save_that_replaces_a_checkpoint_and_is_cut_off_leaves_a_whole_one(tmp_path: Path, name: str) -> None:
    root = tmp_path / "checkpoints"
    target = CheckpointStore(root, keep=2).save(checkpoint(4))
    aside = root / ".aside-step_4"
    if name == "before the rename":
        target.rename(aside)
    else:
        shutil.copytree(target, aside)
    assert newest(CheckpointStore(root, keep=2)).ledger.version.step == 4
    assert not aside.exists()


def test_where_no_checkpoint_is_whole_the_run_does_not_silently_begin_anew(store: CheckpointStore) -> None:
    for step in (10, 20):
        (store.save(checkpoint(step)) / "state.json").unlink()
    with pytest.raises(CheckpointError, match="step_20"):
        store.load_newest(run="r", model=MODEL)


def test_damaged_checkpoints_do_not_take_the_place_of_whole_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=3)
    for step in (20, 30, 40):
        folder = store.save(checkpoint(step))
        if step > 20:
            (folder / "model.safetensors").write_bytes(b"")
    assert newest(store).ledger.version.step == 20
    for step in (25, 26):
        store.save(checkpoint(step))
    assert {"step_20", "step_25", "step_26"} <= steps_of(tmp_path)


def test_a_checkpoint_of_another_model_is_refused_with_what_to_do(store: CheckpointStore) -> None:
    store.save(checkpoint(1, model="b" * 64))
    with pytest.raises(
        CheckpointError, match=r"step_1: began from another model \(configuration and weights b{12}, this run.s are a{12}\); use"
    ):
        store.load_newest(run="r", model=MODEL)


def test_a_checkpoint_of_another_run_is_refused_with_what_to_do(store: CheckpointStore) -> None:
    store.save(checkpoint(1, run="other"))
    with pytest.raises(CheckpointError, match=r"step_1: belongs to run 'other', not 'r'; choose another run.dir"):
        store.load_newest(run="r", model=MODEL)


def test_a_ledger_of_another_schema_is_refused(store: CheckpointStore) -> None:
    with pytest.raises(ValidationError, match="schema_version"):
        Ledger.model_validate(checkpoint(1).ledger.model_dump() | {"schema_version": 2})


def test_what_a_killed_save_left_is_no_checkpoint(store: CheckpointStore, tmp_path: Path) -> None:
    folder = store.save(checkpoint(1))
    shutil.copytree(folder, tmp_path / "checkpoints" / ".staged-0123")
    (tmp_path / "checkpoints" / "step_x").mkdir()
    assert newest(store).ledger.version.step == 1
    store.save(checkpoint(2))
    assert newest(store).ledger.version.step == 2


def test_what_a_killed_save_left_is_removed_when_the_run_goes_on(store: CheckpointStore, tmp_path: Path) -> None:
    # A checkpoint is as large as the model and its optimizer: leftovers of crashes would fill the disk.
    shutil.copytree(store.save(checkpoint(1)), tmp_path / "checkpoints" / ".staged-0123")
    CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert steps_of(tmp_path) == {"step_1"}


def test_a_model_is_another_one_as_soon_as_one_weight_differs(tmp_path: Path) -> None:
    for name in ("model", "same", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"weights" if name != "other" else b"wEights")
    model, same, other = (model_identity(tmp_path / name) for name in ("model", "same", "other"))
    assert model == same != other
    (tmp_path / "same" / "config.json").write_text('{"layers": 2}')
    assert model_identity(tmp_path / "same") != model


def test_a_checkpoint_under_another_step_s_name_is_refused_and_the_one_before_it_loads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=3)
    first, second = store.save(checkpoint(1)), store.save(checkpoint(2))
    second.rename(second.with_name("step_26"))
    loaded = CheckpointStore(tmp_path / "checkpoints", keep=3).load_newest(run="r", model=checkpoint(1).ledger.model)
    assert loaded is not None and loaded.ledger.version.step == 1
    assert "step_26: holds step 2" in caplog.text
    assert first.is_dir()
