"""Checkpoints: the only truth about a run. Each is a folder step_N/ that is whole or refused.

step_40/
  model.safetensors        fp32 master weights
  optimizer.safetensors    AdamW moments and step counts, by parameter name; RNG state
  state.json               ledger: step, dispatch index, consumed groups, model identity
  hashes.json              size and blake3 of the other files, written last
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

from pydantic import Field, TypeAdapter, ValidationError
from safetensors.torch import load_file
from torch import Tensor

from mars_shared.contracts import Message, PolicyVersion, Prompt, WeightFile
from mars_shared.errors import CheckpointError, IntegrityError
from mars_shared.faults import fault
from mars_shared.files import fsync_path, write_atomic
from mars_shared.weights import describe_file, model_fingerprint
from mars_trainer.tensors import save_tensors

logger = logging.getLogger(__name__)

_HASHES = "hashes.json"
_ASIDE = "aside-"
_NAMES = {"model.safetensors", "optimizer.safetensors", "state.json"}
_FILES = TypeAdapter(tuple[WeightFile, ...])


class Ledger(Message):
    """What a run has done: with the tensors beside it, all that a restart needs."""

    run: str
    model: str = Field(description="identity of the model that the run began from")
    version: PolicyVersion
    next_dispatch_index: int = Field(ge=0)
    consumed: tuple[tuple[int, ...], ...] = Field(description="dispatch indices trained on, step by step, in order")
    filtered: tuple[int, ...] = Field(default=(), description="dispatch indices whose groups had no signal")
    dead: tuple[int, ...] = Field(default=(), description="dispatch indices that were dead-lettered")
    retried: tuple[int, ...] = Field(default=(), description="those of the dead whose prompts were asked again, as others")
    dispatched: tuple[Prompt, ...] = Field(default=(), description="prompts asked and not trained on, in dispatch order")


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name and the ledger."""

    ledger: Ledger
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


class CheckpointStore:
    """The checkpoints of one run, newest verified one first."""

    def __init__(self, root: Path, *, keep: int) -> None:
        self._root = root
        self._keep = keep
        root.mkdir(parents=True, exist_ok=True)
        self._clean_up()

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write durably under step_N: staged, synced, then renamed. Older ones beyond `keep` go."""
        target = self._root / f"step_{checkpoint.ledger.version.step}"
        try:
            staged = self._stage(checkpoint)
            fault("trainer.before_commit")
            self._put_in_place(staged, target)
        except OSError:
            self._clean_up()  # what did not fit must not keep room from the next attempt
            raise
        for old in list(self._newest_first())[self._keep :]:
            if old != target:
                shutil.rmtree(old)
        return target

    def _stage(self, checkpoint: Checkpoint) -> Path:
        staged = self._root / f".staged-{uuid4().hex}"
        staged.mkdir()
        save_tensors(checkpoint.model, staged / "model.safetensors")
        save_tensors(checkpoint.optimizer, staged / "optimizer.safetensors")
        (staged / "state.json").write_text(checkpoint.ledger.model_dump_json(), encoding="utf-8")
        files = sorted(staged.iterdir())
        for file in files:
            fsync_path(file)
        write_atomic(staged / _HASHES, _FILES.dump_json(tuple(describe_file(file) for file in files)))
        return staged

    def _put_in_place(self, staged: Path, target: Path) -> None:
        """Rename; a checkpoint of the same step, from a lineage that ended, steps aside first and comes back if this is cut off."""
        aside = target.with_name(f".{_ASIDE}{target.name}")
        if target.exists():
            os.rename(target, aside)
        os.rename(staged, target)
        fsync_path(self._root)
        if aside.exists():
            shutil.rmtree(aside)

    def _clean_up(self) -> None:
        """After a save that was cut off."""
        for cut_off in self._root.glob(".staged-*"):
            shutil.rmtree(cut_off)
        for aside in self._root.glob(f".{_ASIDE}*"):
            target = aside.with_name(aside.name.removeprefix(f".{_ASIDE}"))
            if target.exists():
                shutil.rmtree(aside)
            else:
                os.rename(aside, target)

    def load_newest(self, *, run: str, model: str) -> Checkpoint | None:
        """The newest checkpoint that verifies and is this run's; others are named in the log and passed over.

        Raises:
            CheckpointError: there are checkpoints, and none can be used.
        """
        refused: list[tuple[Path, str]] = []
        for folder in list(self._newest_first()):
            try:
                checkpoint = load_checkpoint(folder)
                _check_belongs(checkpoint.ledger, folder, run=run, model=model)
            except (IntegrityError, CheckpointError) as error:
                logger.error("checkpoint refused, the one before it is tried: %s", error)
                refused.append((folder, str(error)))
                continue
            for other, _ in refused:
                os.rename(other, other.with_name(f"refused-{other.name}-{uuid4().hex[:8]}"))
            return checkpoint
        if refused:
            raise CheckpointError(
                f"no checkpoint in {self._root} can be used, the newest says: {refused[0][1]}; "
                "remove the folder to begin the run anew, or choose another run.dir"
            )
        return None

    def _newest_first(self) -> Iterator[Path]:
        folders = [path for path in self._root.glob("step_*") if path.name[5:].isdigit()]
        return iter(sorted(folders, key=lambda path: int(path.name[5:]), reverse=True))


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint after checking every file's size and hash.

    Raises:
        IntegrityError: a file is missing, cut short or changed; the message names it.
    """
    try:
        expected_files = _FILES.validate_json((folder / _HASHES).read_bytes())
    except (FileNotFoundError, ValidationError) as error:
        raise IntegrityError(f"{folder / _HASHES}: missing or unreadable; the checkpoint is incomplete") from error
    listed = {file.name for file in expected_files}
    if listed != _NAMES:
        raise IntegrityError(f"{folder / _HASHES}: lists {sorted(listed)}; expected {sorted(_NAMES)}")
    for expected in expected_files:
        path = folder / expected.name
        if not path.is_file():
            raise IntegrityError(f"{path}: missing")
        if describe_file(path) != expected:
            raise IntegrityError(f"{path}: its size or hash is not the recorded one ({expected.size_bytes} bytes)")
    try:
        ledger = Ledger.model_validate(json.loads((folder / "state.json").read_bytes()))
    except ValidationError as error:
        raise IntegrityError(f"{folder / 'state.json'}: not a ledger of schema 1 ({error.error_count()} errors)") from error
    return Checkpoint(
        ledger=ledger,
        model=load_file(folder / "model.safetensors"),
        optimizer=load_file(folder / "optimizer.safetensors"),
    )


def model_identity(folder: Path) -> str:
    """Hash of a model folder's configuration and weights: what a run began from, and its KL reference."""
    files = sorted(folder.glob("*.safetensors"))
    parts = [model_fingerprint(folder), *(f"{file.name} {describe_file(file).blake3}" for file in files)]
    return sha256("\n".join(parts).encode()).hexdigest()


def _check_belongs(ledger: Ledger, folder: Path, *, run: str, model: str) -> None:
    if ledger.model != model:
        raise CheckpointError(
            f"{folder}: began from another model (configuration and weights {ledger.model[:12]}, this run's are {model[:12]}); "
            "use the model it began from, or another run.dir"
        )
    if folder.name != f"step_{ledger.version.step}":
        raise CheckpointError(f"{folder}: holds step {ledger.version.step}; give it its own name, or move it away")
    if ledger.run != run:
        raise CheckpointError(f"{folder}: belongs to run {ledger.run!r}, not {run!r}; choose another run.dir")
