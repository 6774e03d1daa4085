"""Shows a run's events as they come: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mars_shared.telemetry import parse_lines

PLAIN_EVERY_STEPS = 5


class EventTail:
    """Yields a growing event log's new whole lines."""

    def __init__(self, path: Path, *, from_end: bool) -> None:
        self._path = path
        self._offset = path.stat().st_size if from_end and path.exists() else 0

    def new(self) -> Iterator[dict[str, Any]]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield from parse_lines([line.decode()])


class RunDisplay:
    """Prints what happens in a run, for whoever waits."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def say(self, text: str) -> None:
        """One line, above the bar if there is one."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def show(self, event: dict[str, Any]) -> None:
        """Show one event of the run's log."""
        match event["event"]:
            case "step":
                self._on_step(event)
            case "resumed":
                self.say(f"going on from step {event['step']} as incarnation {event['incarnation']}")
            case "self_test":
                self.say(_self_test_line(event))
            case "evaluation" | "evaluated":
                self.say(_evaluation_line(event))
            case "dead":
                self.say(" ".join(filter(None, ("dead letter:", event.get("prompt_id"), event["reason"]))))
            case "short":
                self.say(f"step {event['step']} trains on {event['kept']} of {event['wanted']} groups: {_lacking(event)}")
            case "skipped":
                self.say(f"step {event['step']} is skipped: {_lacking(event)}")
            case "finished":
                self.say(f"finished at step {event['step']}, weights {event['weights'][:16]}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _on_step(self, event: dict[str, Any]) -> None:
        summary = _step_text(event["metrics"])
        if not self._console.is_terminal:
            if event["step"] % PLAIN_EVERY_STEPS == 0 or event["step"] in (1, event["steps"]):
                self.say(f"step {event['step']}/{event['steps']}  {summary}")
            return
        if self._bar is None:
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("", total=event["steps"])
            self._bar.start()
        assert self._task is not None
        self._bar.update(self._task, completed=event["step"], description=summary)


def _step_text(metrics: dict[str, float]) -> str:
    parts = [f"reward {metrics['reward']:.3f}"]
    if "gain" in metrics:
        parts += [f"gain {metrics['gain']:+.3f}", f"conflict {metrics['conflict_rate']:.2f}"]
    return "  ".join([*parts, f"length {metrics['completions/mean_length']:.1f}"])


def _lacking(event: dict[str, Any]) -> str:
    return f"{event['without_signal']} of the groups looked at had no signal"


def _self_test_line(event: dict[str, Any]) -> str:
    return (
        f"self-test: sampler and trainer agree on {event['image_tokens']} image tokens, pixels, box frames and {event['tokens']} "
        f"log-probabilities (largest difference {event['logprob_difference_max']:.1e}; {event['seconds']:.1f} s)"
    )


def _evaluation_line(event: dict[str, Any]) -> str:
    mono = "  ".join(f"{name} {value:.3f}" for name, value in event["mono"].items())
    return (
        f"evaluation at step {event['step']} ({event['samples']} samples): "
        f"multi {event['multi']:.3f}  {mono}  union {event['union']:.3f}  ({event['seconds']:.0f} s)"
    )
