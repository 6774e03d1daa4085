"""In which coordinate frame a model writes boxes: its family's, unless the recipe says otherwise; and which boxes an image holds.

IoU in the wrong frame looks like a weak model and raises nothing, so that an unknown family is an error and never a guess.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from mars_shared.contracts import FrameKind
from mars_shared.contracts.prompt import Box
from mars_shared.errors import ConfigError
from mars_shared.model_folder import read_config
from mars_shared.settings import ModelSection

logger = logging.getLogger(__name__)

FRAMES = {
    "qwen2_vl": FrameKind.PER_MILLE,
    "qwen2_5_vl": FrameKind.RESIZED,
    "qwen3_vl": FrameKind.PER_MILLE,
    "qwen3_vl_moe": FrameKind.PER_MILLE,
}
"""By model_type, as the families' authors trained them."""


def box_frame_of(model_type: str) -> FrameKind:
    """The frame of a model family.

    Args:
        model_type: as in a model folder's config.json.

    Raises:
        ConfigError: the family's frame is unknown.

    Example:
        box_frame_of("qwen3_vl") is FrameKind.PER_MILLE
    """
    if (kind := FRAMES.get(model_type)) is None:
        raise ConfigError(
            f"the frame in which models of family {model_type!r} write boxes is unknown; expected one of {', '.join(FRAMES)}, "
            f"or set model.box_frame to {', '.join(FrameKind)}"
        )
    return kind


def resolved_box_frame(model: ModelSection) -> FrameKind:
    """The recipe's `model.box_frame`; where it is unset, the frame of the model's family.

    One that differs from the family's is taken, since a model can be tuned to another frame, with a warning.

    Raises:
        ConfigError: unset, and the family's frame is unknown; or config.json cannot be read.
    """
    family, chosen = str(read_config(model.path).get("model_type")), model.box_frame
    if chosen is None:
        return box_frame_of(family)
    if chosen is not (usual := FRAMES.get(family, chosen)):
        logger.warning("model.box_frame is %s; models of family %s write %s unless tuned otherwise", chosen, family, usual)
    return chosen


def box_faults(boxes: Sequence[Box], size_px: tuple[int, int]) -> list[str]:
    """One line for each box (x1, y1, x2, y2) that is inside out or outside an image of this (width, height)."""
    width, height = size_px
    return [
        f"box {index} is ({x1:g}, {y1:g}, {x2:g}, {y2:g}); expected x1 < x2 and y1 < y2 "
        f"inside the image of {width} x {height} pixels"
        for index, (x1, y1, x2, y2) in enumerate(boxes)
        if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height)
    ]
