"""Weights & Biases: its files in <run.dir>/wandb; online or offline as W&B's own variables say (WANDB_MODE)."""

from __future__ import annotations

import io
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from mars_shared.files import write_atomic
from mars_shared.records.groups import GroupRecord, Occasion
from mars_shared.settings import Recipe
from mars_trainer.trackers.table import Row, rows_of

WRITE_EVERY_S = 1.0
"""In which W&B's own process, which dies with this one, writes what it has."""

logger = logging.getLogger(__name__)


class WandbTracker:
    """One W&B run for one of ours, over all its restarts. W&B takes nothing back: a step is what it was the first time."""

    def __init__(self, recipe: Recipe) -> None:
        import wandb

        self._wandb = wandb
        folder = recipe.run.dir / "wandb"
        self._run = wandb.init(
            id=run_id(folder),
            resume="allow",
            project=recipe.track.project,
            name=recipe.run.name,
            # A URL may hold a password.
            config=recipe.model_dump(mode="json", exclude={"weights": {"url"}}),
            dir=recipe.run.dir,
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True, save_code=False, x_transaction_log_flush_interval=WRITE_EVERY_S),
        )
        self._run.define_metric("*", step_metric="step")
        logger.info("W&B: %s", f"offline, `wandb sync {folder}/offline-run-*` sends it" if self._run.offline else self._run.url)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def groups(self, step: int, occasion: Occasion, groups: Sequence[GroupRecord], picture: bytes | None) -> None:
        table = self._wandb.Table(columns=list(Row._fields), data=[list(row) for row in rows_of(groups)])
        shown = {"step": step, f"samples/{occasion}/table": table}
        if picture is not None:
            shown[f"samples/{occasion}/picture"] = self._wandb.Image(Image.open(io.BytesIO(picture)))
        self._run.log(shown)

    def rewind(self, step: int) -> bool:
        return False

    def flush(self) -> None:
        time.sleep(2 * WRITE_EVERY_S)  # W&B has no call for it

    def close(self) -> None:
        self._run.finish()
        self._wandb.teardown()  # its own process writes on until then


def run_id(folder: Path) -> str:
    """The W&B id of the run: made once, kept in its folder."""
    path = folder / "id"
    if not path.exists():
        write_atomic(path, secrets.token_hex(8).encode())
    return path.read_text()
