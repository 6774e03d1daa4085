"""TensorBoard: event files in <run.dir>/tensorboard, read by `tensorboard --logdir`."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from PIL import Image

from mars_shared.records.groups import GroupRecord, Occasion
from mars_shared.settings import Recipe
from mars_trainer.trackers.table import markdown, rows_of


class TensorBoardTracker:
    """Writes scalars, tables as Markdown and pictures; every opening begins a file."""

    def __init__(self, recipe: Recipe) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = recipe.run.dir / "tensorboard"
        # TensorBoard reads files in the order of their names; those that began within one second have none.
        while any(folder.glob(f"events.out.tfevents.{int(time.time())}.*")):
            time.sleep(0.1)
        self._writer = SummaryWriter(str(folder))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def groups(self, step: int, occasion: Occasion, groups: Sequence[GroupRecord], picture: bytes | None) -> None:
        self._writer.add_text(f"samples/{occasion}", markdown(rows_of(groups)), step)
        if picture is not None:
            pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
            self._writer.add_image(f"samples/{occasion}", pixels, step, dataformats="HWC")
        self._writer.flush()

    def rewind(self, step: int) -> bool:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        # What stands before a start and has its step or a later one is no longer shown.
        start = Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        cast(Any, self._writer.file_writer).add_event(start)
        return True

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
