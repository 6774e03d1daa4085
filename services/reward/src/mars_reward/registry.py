"""Which recipe scores which kind of ground truth with which function."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from mars_reward.custom import CustomReward
from mars_reward.metrics import FAILURES
from mars_reward.parts import Parts, Scorer
from mars_reward.rewards.boxes import Box
from mars_reward.rewards.grounding import NO_FRAME, answered_boxes, check_objects, score_grounding
from mars_reward.rewards.released import released_grounding, released_vqa
from mars_reward.rewards.vqa import score_vqa
from mars_shared.contracts import BoxesTruth, Score, ScoreItem, TextTruth
from mars_shared.errors import ConfigError, InputError, RewardError, RewardNotFiniteError


def _paper_boxes(item: ScoreItem) -> Parts:
    assert isinstance(item.truth, BoxesTruth)
    score = score_grounding(item.completion, item.truth, item.frame)
    return Parts({"format": score.format, "iou": score.iou}, score.parsed)


def _paper_text(item: ScoreItem) -> Parts:
    assert isinstance(item.truth, TextTruth)
    score = score_vqa(item.completion, item.truth)
    return Parts({"format": score.format, "accuracy": score.accuracy}, score.parsed)


def _released_boxes(item: ScoreItem) -> Parts:
    truth, frame = item.truth, item.frame
    assert isinstance(truth, BoxesTruth)
    if frame is None:
        raise InputError(NO_FRAME)
    check_objects(truth)
    score = released_grounding(item.completion, truth.boxes, scale=(truth.width_px / frame.width, truth.height_px / frame.height))
    return Parts({"format": score.format, "iou": score.iou}, score.parsed)


def _released_text(item: ScoreItem) -> Parts:
    assert isinstance(item.truth, TextTruth)
    score = released_vqa(item.completion, item.truth.text)
    return Parts({"format": score.format, "accuracy": score.accuracy}, score.parsed)


RECIPES: dict[str, Mapping[str, Scorer]] = {
    "paper": {"boxes": _paper_boxes, "text": _paper_text},
    "released": {"boxes": _released_boxes, "text": _released_text},
}
"""Scorers by recipe, then by the truth's kind; another recipe is another row."""


@contextmanager
def offered(recipe: str, *, time_limit_s: float) -> Iterator[None]:
    """Add a custom reward to RECIPES for as long as the body runs; does nothing for one that is there.

    Only who starts the service can add one: a request names what is offered and nothing else.

    Raises:
        ConfigError: there is no such function, or its module fails.
    """
    if recipe in RECIPES:
        yield
        return
    try:
        reward = CustomReward(recipe, time_limit_s).start()
    except ConfigError as error:
        raise ConfigError(f"{error}; expected one of {', '.join(sorted(RECIPES))}, or a function of your own") from error
    RECIPES[recipe] = {"boxes": reward, "text": reward}
    try:
        yield
    finally:
        del RECIPES[recipe]
        reward.stop()


def check_recipe(recipe: str) -> str:
    """The recipe itself, if it is known.

    Raises:
        ConfigError: it isn't; the message lists those that are.
    """
    if recipe not in RECIPES:
        raise ConfigError(f"reward recipe {recipe!r} is unknown; expected one of {', '.join(sorted(RECIPES))}")
    return recipe


def score(item: ScoreItem, recipe: str, *, what: str = "completion") -> Score:
    """Score one completion.

    Args:
        what: names the completion in errors, e.g. "item 3".

    Raises:
        ConfigError: unknown recipe.
        InputError: the item lacks something that its scoring needs.
        RewardError: the reward failed, or (a subclass) took too long, ended its process or isn't finite.
    """
    scorer = RECIPES[check_recipe(recipe)][item.truth.kind]
    try:
        return to_score(scorer(item), _boxes_of(item))
    except InputError as error:
        raise InputError(f"{what}: {error}") from error
    except RewardError as error:
        FAILURES.labels(reason=error.reason).inc()
        raise type(error)(f"{what}: {error}", error.traceback) from error
    except Exception as error:
        error.add_note(f"while scoring {what}")
        raise


def _boxes_of(item: ScoreItem) -> tuple[Box, ...]:
    """What to draw, whatever the recipe makes of it."""
    if not isinstance(item.truth, BoxesTruth) or item.frame is None:
        return ()
    return tuple(answered_boxes(item.completion, item.truth, item.frame) or ())


def to_score(found: Parts, boxes: tuple[Box, ...] = ()) -> Score:
    """The reward as the sum of its parts.

    Raises:
        RewardNotFiniteError: a part isn't finite, or their sum isn't.
    """
    for name, value in found.parts.items():
        if not math.isfinite(value):
            raise RewardNotFiniteError(f"reward part {name!r} is {value}; expected a finite number")
    try:
        reward = math.fsum(found.parts.values())
    except OverflowError:
        raise RewardNotFiniteError(f"the sum of the reward's parts {dict(found.parts)} is beyond float64") from None
    return Score(reward=reward, parts=dict(found.parts), parsed=found.parsed, boxes=boxes)
