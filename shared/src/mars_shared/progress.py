"""Shows a run's events as they come: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID, TextColumn

from mars_shared.bars import PLAIN_EVERY_S, bar_columns
from mars_shared.pace import Pace
from mars_shared.terminal import printable_lines

PLAIN_EVERY_STEPS = 5
STARTING, STEPS, EVALUATING = "starting", "training", "evaluating"
"""What there are bars of."""


class RunDisplay:
    """Prints what happens in a run, for whoever waits."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._paces: defaultdict[str, Pace] = defaultdict(Pace)
        self._said_at = 0.0
        """When a plain line told how far an evaluation is, by the events' clock."""

    def say(self, text: str) -> None:
        """Text of some lines, above the bars if there are any."""
        self._console.print(printable_lines(text), highlight=False, markup=False, soft_wrap=True)

    def starting(self, ready: int, services: int) -> None:
        """So many of the services are ready; a bar on a terminal, until all are."""
        if ready == services:
            self._end(STARTING)
        else:
            self._show_bar(STARTING, ready, services)

    def show(self, event: dict[str, Any]) -> None:
        """Show one event of the run's log."""
        match event["event"]:
            case "step":
                self._on_step(event)
            case "evaluating":
                self._on_evaluating(event)
            case "resumed":
                self.say(f"going on from step {event['step']} as incarnation {event['incarnation']}")
            case "self_test":
                self.say(_self_test_line(event))
            case "evaluation" | "evaluated":
                self._end(EVALUATING)
                self.say(evaluation_line(event))
            case "dead":
                self.say(" ".join(filter(None, ("dead letter:", event.get("prompt_id"), event["reason"]))))
            case "short":
                self.say(f"step {event['step']} trains on {event['kept']} of {event['wanted']} groups: {_lacking(event)}")
            case "skipped":
                self.say(f"step {event['step']} is skipped: {_lacking(event)}")
            case "stopped":
                self.say(
                    f"stopped at step {event['step']}; `mars train` on the same run folder goes on from its newest checkpoint"
                )
            case "finished":
                self.say(f"finished at step {event['step']}, weights {event['weights'][:16]}")

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()

    def _on_step(self, event: dict[str, Any]) -> None:
        done, total, summary = event["step"], event["steps"], _step_text(event["metrics"])
        pace = self._paced(STEPS, event["time"], done, total, "step")
        self._show_bar(STEPS, done, total, pace=pace, note=summary)
        if not self._console.is_terminal and (done % PLAIN_EVERY_STEPS == 0 or done in (1, total)):
            self.say("  ".join(filter(None, (f"step {done}/{total}", summary, pace and f"({pace})"))))

    def _on_evaluating(self, event: dict[str, Any]) -> None:
        done, total, time_s = event["done"], event["samples"], event["time"]
        pace = self._paced(EVALUATING, time_s, done, total, "sample")
        self._show_bar(EVALUATING, done, total, pace=pace)
        if not self._console.is_terminal and done and time_s - self._said_at >= PLAIN_EVERY_S:
            self._said_at = time_s
            self.say("  ".join(filter(None, (f"evaluating {done}/{total}", pace and f"({pace})"))))

    def _paced(self, what: str, time_s: float, done: int, total: int, unit: str) -> str:
        pace = self._paces[what]
        pace.see(time_s, done)
        return pace.text(total, unit) if done < total else ""

    def _show_bar(self, what: str, done: int, total: int, *, pace: str = "", note: str = "") -> None:
        if not self._console.is_terminal:
            return
        if self._bars is None:
            self._bars = Progress(TextColumn("{task.description}"), *bar_columns(), console=self._console)
            self._bars.start()
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total, pace="", note="")
        self._bars.update(self._tasks[what], completed=done, total=total, pace=pace, note=note)

    def _end(self, what: str) -> None:
        """Take away the bar of something that is over."""
        if self._bars is not None and what in self._tasks:
            self._bars.remove_task(self._tasks.pop(what))


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


def evaluation_line(event: dict[str, Any]) -> str:
    """An evaluation's results in one line."""
    mono = "  ".join(f"{name} {value:.3f}" for name, value in event["mono"].items())
    return (
        f"evaluation at step {event['step']} ({event['samples']} samples): "
        f"multi {event['multi']:.3f}  {mono}  union {event['union']:.3f}  ({event['seconds']:.0f} s)"
    )
