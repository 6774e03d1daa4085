"""What an evaluation found, as a table for the terminal and as Markdown: the end of `mars eval`.

One row for each dataset and view: Multi, Mono of each source, Union, Multi - Union.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mars_shared.errors import ConfigError, MarsError
from mars_shared.files import write_atomic
from mars_shared.settings import Recipe, load_recipe
from mars_shared.telemetry import read_events
from mars_trainer.algorithm.bootstrap import Interval, mean_interval
from mars_trainer.evaluate import CORRECT_IOU, EvaluationKind, Result, SampleResult, by_dataset, read_results

COLUMNS = ("dataset", "view", "samples", "metric", "mean", "95 %", "correct", "parsed")
SHOWN = ("samples", "mean", "95 %", "correct", "parsed")
TITLES = {"multi": "Multi", "union": "Union", "multi_minus_union": "Multi - Union"}
"""Of views, for people; the others are mono/<source>."""
METRICS = {"accuracy": "accuracy", "iou": "mIoU"}
MEAN_OF_DATASETS = "mean of datasets"


@dataclass(frozen=True)
class ResultRow:
    """Means of one view (multi, mono/<source>, union, multi_minus_union) over a dataset's samples; None where none has a value.

    `samples` is what is averaged over: by the released arithmetic, those that its script doesn't drop.
    """

    dataset: str
    view: str
    metric: str
    samples: int
    mean: float | None
    interval: Interval | None = None
    correct: float | None = None
    parsed: float | None = None

    @property
    def cells(self) -> tuple[str, ...]:
        """As COLUMNS."""
        title = TITLES.get(self.view) or f"Mono {self.view.removeprefix('mono/')}"
        interval = "" if self.interval is None else f"{self.interval[0]:.3f} to {self.interval[1]:.3f}"
        numbers = ["" if value is None else f"{value:.3f}" for value in (self.mean, self.correct, self.parsed)]
        return self.dataset, title, str(self.samples), self.metric, numbers[0], interval, numbers[1], numbers[2]


def result_rows(results: Sequence[SampleResult], *, released: bool = False) -> list[ResultRow]:
    """The table's rows.

    Args:
        released: by the arithmetic of the paper's released script, which drops samples that it cannot
            parse; Union is then over the sources that it doesn't drop.
    """
    rows = [row for name, part in by_dataset(results).items() for row in _rows_of(name, part, released)]
    multi = [row.mean for row in rows if row.view == "multi" and row.mean is not None]
    if len(multi) > 1:
        rows.append(ResultRow(MEAN_OF_DATASETS, "multi", "", len(results), _mean(multi)))
    return rows


def _rows_of(name: str, results: Sequence[SampleResult], released: bool) -> Iterable[ResultRow]:
    metric = " / ".join(sorted({METRICS[result.metric] for result in results}))
    sources = dict.fromkeys(source for result in results for source in result.mono)
    views = {"multi": [result.multi for result in results]}
    views |= {f"mono/{source}": [r.mono[source] for r in results if source in r.mono] for source in sources}
    for view, answers in views.items():
        kept = [answer for answer in answers if _value(answer, released) is not None]
        values = [_known(_value(answer, released)) for answer in kept]
        yield ResultRow(
            dataset=name,
            view=view,
            metric=metric,
            samples=len(kept),
            mean=_mean(values),
            interval=mean_interval(values) if values else None,
            correct=_mean([_correct(answer, released) for answer in kept]),
            parsed=_mean([answer.parsed for answer in answers]),
        )
    pairs = [(_value(result.multi, released), _union(result, released)) for result in results]
    union = [best for _, best in pairs if best is not None]
    yield ResultRow(name, "union", metric, len(union), _mean(union), mean_interval(union) if union else None)
    paired = [value - best for value, best in pairs if value is not None and best is not None]
    yield ResultRow(name, "multi_minus_union", metric, len(paired), _mean(paired), mean_interval(paired) if paired else None)


def _value(result: Result, released: bool) -> float | None:
    if not released:
        return result.value
    assert result.released is not None
    return result.released.value


def _correct(result: Result, released: bool) -> bool:
    if not released:
        return result.value > CORRECT_IOU
    assert result.released is not None
    return result.released.correct


def _union(result: SampleResult, released: bool) -> float | None:
    values = [value for answer in result.mono.values() if (value := _value(answer, released)) is not None]
    return max(values, default=None)


def _known(value: float | None) -> float:
    assert value is not None
    return value


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def markdown(rows: Sequence[ResultRow], title: str) -> str:
    """The rows as a Markdown table below a heading."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(row.cells for row in rows)]
    return "\n".join([f"# {title}", "", *("| " + " | ".join(cells) + " |" for cells in lines), ""])


def show(rows: Sequence[ResultRow], title: str, console: Console) -> None:
    """The rows in the terminal, a table for each dataset."""
    console.print(title, highlight=False, markup=False, soft_wrap=True)
    for dataset, part in groupby(rows, key=lambda row: row.dataset):
        found = list(part)
        table = Table(title=Text(" ".join(filter(None, (dataset, found[0].metric)))))
        for column in ("view", *SHOWN):
            table.add_column(column, justify="left" if column == "view" else "right")
        for row in found:
            cells = dict(zip(COLUMNS, row.cells, strict=True))
            table.add_row(*(cells[column] for column in ("view", *SHOWN)))
        console.print(table)


def newest_evaluation(recipe: Recipe) -> dict[str, Any]:
    """The event of the newest evaluation, of the run itself or by `mars eval`.

    Raises:
        ConfigError: there is none.
    """
    events = read_events(recipe.run.dir / "events.jsonl")
    evaluations = [event for event in events if event["event"] in get_args(EvaluationKind)]
    if not evaluations:
        raise ConfigError(f"{recipe.run.dir} has no evaluation; expected one that `mars eval` or a run made")
    return evaluations[-1]


def unanswered(results: Sequence[SampleResult], asked: Mapping[str, int]) -> list[str]:
    """One line for each dataset of which samples were asked and not answered: no number counts them."""
    answered = Counter(result.dataset for result in results)
    return [
        f"{name}: {count - answered[name]} of {count} samples were not answered and are in no number; "
        "`dead` events of the run say why"
        for name, count in asked.items()
        if answered[name] < count
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Show the newest evaluation and write it as Markdown beside its results; returns the exit code."""
    parser = argparse.ArgumentParser(prog="mars_trainer.results", description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--released", action="store_true", help="by the arithmetic of the paper's released script")
    parser.add_argument("--json", action="store_true", help="a JSON object instead of tables")
    options = parser.parse_args(arguments)
    try:
        recipe = load_recipe(options.recipe)
        event = newest_evaluation(recipe)
        file = recipe.run.dir / "evaluations" / event["results"]
        results = read_results(file)
    except MarsError as error:
        sys.stderr.write(f"mars: {error}\n")
        return error.exit_code
    arithmetic = ", arithmetic of the released script" if options.released else ""
    rows, missing = result_rows(results, released=options.released), unanswered(results, event["asked"])
    page = file.with_name(f"{file.stem}{'-released' if options.released else ''}.md")
    title = f"{recipe.run.name} after step {event['step']}: held-out samples, greedy{arithmetic}"
    write_atomic(page, "\n".join([markdown(rows, title), *missing]).encode())
    if options.json:
        about = {"run": recipe.run.name, "step": event["step"], "released": options.released, "asked": event["asked"]}
        found = {"results": [asdict(row) for row in rows], "samples": str(file), "table": str(page)}
        sys.stdout.write(json.dumps(about | found) + "\n")
        return 0
    show(rows, title, Console())
    sys.stdout.write("".join(f"{line}\n" for line in missing))
    sys.stdout.write(f"every sample: {file}\ntable: {page}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
