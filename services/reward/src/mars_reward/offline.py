"""Scores completions in a JSON-lines file: `mars score --recipe released ROWS.jsonl`.

A row has `task` ("grounding" or "vqa"), `completion` and `ground_truth` (boxes
[[x1, y1, x2, y2], ...] in the completion's own coordinates, or a text). The same row comes out
with `format`, `iou` or `accuracy`, and `score`. With a reward of one's own a row may also have
`question`; where that reward fails, `score` is null and `error` says why.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mars_reward.registry import offered, score
from mars_reward.rewards.released_eval import released_eval
from mars_shared.bars import tracked
from mars_shared.contracts import BoxesTruth, BoxFrame, FrameKind, ScoreItem, TextTruth
from mars_shared.errors import ConfigError, InputError, MarsError, RewardError
from mars_shared.http import explain_validation
from mars_shared.settings import RewardSection

TASKS = ("grounding", "vqa")


def main(arguments: Sequence[str] | None = None) -> int:
    """Score a file; returns the exit code."""
    parser = argparse.ArgumentParser(prog="mars score", description="Score completions offline; JSON lines in, JSON lines out.")
    parser.add_argument("rows", type=Path, metavar="ROWS.jsonl")
    parser.add_argument("--recipe", default="paper", help="paper, released, or a function of your own as in [reward] recipe")
    parser.add_argument(
        "--time-limit", type=float, default=RewardSection().time_limit_s, metavar="S", help="CPU seconds, as reward.time_limit_s"
    )
    parser.add_argument(
        "--released-eval",
        action="store_true",
        help="add what the released evaluation script says: eval_miou (null where it drops the sample) or eval_correct",
    )
    options = parser.parse_args(arguments)
    try:
        if not 0 < options.time_limit < math.inf:
            raise ConfigError(f"--time-limit {options.time_limit}: expected seconds above 0")
        with offered(options.recipe, time_limit_s=options.time_limit):
            rows, unscored = _score_rows(options.rows, options.recipe, released_eval=options.released_eval)
        if unscored:
            raise RewardError(f"{unscored} of {rows} rows of {options.rows} have no score; their field error says why")
    except MarsError as error:
        sys.stdout.flush()
        sys.stderr.write(f"mars: {error}\n")
        return error.exit_code
    return 0


def _score_rows(path: Path, recipe: str, *, released_eval: bool) -> tuple[int, int]:
    """Write every row with its scores to stdout; returns how many rows there are and how many have no score."""
    rows = unscored = 0
    with tracked(read_rows(path), "scoring", "row", count_lines(path)) as found:
        for row in found:
            scored = row.scored(recipe, released_eval=released_eval)
            rows, unscored = rows + 1, unscored + (scored["score"] is None)
            sys.stdout.write(json.dumps(scored, ensure_ascii=False) + "\n")
    return rows, unscored


class Row:
    """One row of a file, whose faults are named by file and line."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self._where = where

    def scored(self, recipe: str, *, released_eval: bool) -> dict[str, Any]:
        """The row with its scores; with "score": null and "error" where the reward fails.

        Raises:
            InputError: a field is missing or wrong.
        """
        item = self._item().model_copy(update={"question": self._question()})
        values = {name: value for name, value in self._values.items() if name != "error"}
        try:
            found = score(item, recipe, what=self._where)
        except RewardError as error:
            values |= {"score": None, "error": str(error)}
        else:
            values |= {**found.parts, "score": found.reward}
        return values | (_released(item) if released_eval else {})

    def _item(self) -> ScoreItem:
        if self._field("task", str) not in TASKS:
            raise InputError(f"{self._where}: task is {self._values['task']!r}; expected one of {', '.join(TASKS)}")
        completion = self._field("completion", str)
        if self._values["task"] == "vqa":
            return self._checked(lambda: ScoreItem(completion=completion, truth=TextTruth(text=self._field("ground_truth", str))))
        boxes = self._field("ground_truth", list)
        return self._checked(lambda: _grounding_item(completion, boxes))

    def _question(self) -> str | None:
        return None if self._values.get("question") is None else self._field("question", str)

    def _field(self, name: str, kind: type) -> Any:
        if name not in self._values:
            raise InputError(f"{self._where}: {name} is missing; expected task, completion and ground_truth")
        value = self._values[name]
        if not isinstance(value, kind):
            raise InputError(f"{self._where}: {name} is {_short(value)}; expected a {kind.__name__}")
        return value

    def _checked(self, make: Any) -> ScoreItem:
        try:
            item: ScoreItem = make()
        except ValidationError as error:
            raise InputError(f"{self._where}: ground_truth: {explain_validation(error.errors(include_url=False))}") from error
        return item


def read_rows(path: Path) -> Iterator[Row]:
    """The file's rows in order; empty lines are left out.

    Raises:
        InputError: the file cannot be read, or a line is no JSON object.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield Row(_object(line, f"{path} line {number}"), f"{path} line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a UTF-8 file of JSON lines") from error


def count_lines(path: Path) -> int | None:
    """Lines of a file that are not empty; None for a pipe, which can be read once, and for what isn't there."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); expected one object a line") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: {_short(value)}; expected an object with task, completion and ground_truth")
    return value


def _grounding_item(completion: str, boxes: list[Any]) -> ScoreItem:
    """The completion is taken to be in the ground truth's pixels."""
    truth = BoxesTruth(boxes=tuple(tuple(box) if isinstance(box, list) else box for box in boxes), width_px=1, height_px=1)
    width, height = (max(1, math.ceil(max(box[side] for box in truth.boxes))) for side in (2, 3))
    return ScoreItem(
        completion=completion,
        truth=truth.model_copy(update={"width_px": width, "height_px": height}),
        frame=BoxFrame(kind=FrameKind.ORIGINAL, width=width, height=height),
    )


def _released(item: ScoreItem) -> dict[str, Any]:
    found = released_eval(item.completion, item.truth)
    return {"eval_miou": found.value} if isinstance(item.truth, BoxesTruth) else {"eval_correct": found.correct}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


if __name__ == "__main__":
    sys.exit(main())
