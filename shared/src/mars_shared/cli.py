"""The command line `mars`. It starts services as processes and asks them over HTTP; it never imports them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mars_shared.cli_dead import app as dead_app
from mars_shared.cli_report import compare_runs, report
from mars_shared.cli_rollout import rollout
from mars_shared.cli_scale import scale
from mars_shared.cli_status import status
from mars_shared.cli_trace import trace
from mars_shared.cli_ui import ui
from mars_shared.cli_watch import watch
from mars_shared.cpu import WorkMeter
from mars_shared.errors import ConfigError, MarsError
from mars_shared.progress import RunDisplay
from mars_shared.settings import Recipe, load_deployment, load_recipe
from mars_shared.stack import TRAINER, Ports, TrainerMode, check_start, read_state, running_stack, service_url
from mars_shared.telemetry import EventLog, EventTail

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
console = Console()
errors = Console(stderr=True)

app.command()(rollout)
app.command()(status)
app.command()(scale)
app.command()(ui)
app.command()(report)
app.command(name="compare")(compare_runs)
app.command()(watch)
app.command()(trace)
app.add_typer(dead_app, name="dead")

POLL_S = 0.2
DEMOS = ("digits", "scene")
DEMO_DIR = "runs/demo"

PASSED_ON: Any = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}
"""A command whose arguments, --help among them, are those of the module that it starts."""
RecipePath = Annotated[Path, typer.Argument(help="TOML recipe, e.g. recipes/digits.toml", metavar="RECIPE")]
BasePort = Annotated[
    int, typer.Option("--port", min=1, max=65_000, help="first port: replicas from here, reward +100, trainer +200")
]


def main() -> None:
    """Entry point: one line per error, exit code by its class."""
    try:
        app()
    except MarsError as error:
        errors.print(f"mars: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(error.exit_code)


@app.command()
def up(recipe_path: RecipePath, port: BasePort = 8100) -> None:
    """Start Valkey, reward, replicas and trainer; serve until Ctrl-C, also after the last step."""
    recipe = load_recipe(recipe_path)
    _run(recipe_path, recipe, port, trainer="linger")


@app.command()
def train(
    recipe_path: RecipePath,
    port: BasePort = 8100,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="start nothing; show the resolved run, the memory it needs and its first prompt")
    ] = False,
) -> None:
    """Start everything, train to the recipe's last step, end everything."""
    recipe = load_recipe(recipe_path)
    if dry_run:
        _dry_run(recipe_path)
        return
    _run(recipe_path, recipe, port, trainer="once")


@app.command()
def demo(
    data: Annotated[str, typer.Option(help="digits or scene")] = "digits",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    port: BasePort = 8100,
) -> None:
    """Train the tiny policy on data that needs no download, and report before and after."""
    if data not in DEMOS:
        raise ConfigError(f"--data is {data!r}; expected {' or '.join(DEMOS)}")
    recipe_path = Path("recipes") / f"{data}.toml"
    if not recipe_path.is_file():
        raise ConfigError(f"no recipe {recipe_path}; expected to be run in the project's folder")
    os.environ["MARS_RUN__SEED"] = str(seed)
    os.environ["MARS_RUN__DIR"] = DEMO_DIR
    recipe = load_recipe(recipe_path)
    if read_state(recipe.run.dir) is not None:
        raise ConfigError(f"a demo runs in {recipe.run.dir} already; stop it first")
    check_start(recipe, Ports(port))  # before the run of the last demo is put aside
    if recipe.run.dir.exists():
        console.print(f"the demo before is kept in {_put_aside(recipe.run.dir)}", highlight=False, soft_wrap=True)
    _run(recipe_path, recipe, port, trainer="once")
    _module("mars_trainer.report", "--recipe", str(recipe_path))
    report(recipe.run.dir)


def _put_aside(folder: Path) -> Path:
    """Rename a run's folder to the first of <folder>-1, <folder>-2, ... that is free."""
    for number in count(1):
        aside = folder.with_name(f"{folder.name}-{number}")
        if not aside.exists():
            return folder.rename(aside)
    raise AssertionError("numbers do not end")


@app.command()
def sft(
    out: Annotated[Path, typer.Option(help="folder of the model that is written", metavar="FOLDER")],
    recipe_path: Annotated[Path | None, typer.Argument(help="TOML recipe whose model is fine-tuned", metavar="RECIPE")] = None,
    target: Annotated[str | None, typer.Option(help="with RECIPE: answer or think; default: its sft.target")] = None,
    seed: Annotated[int | None, typer.Option(help="without RECIPE: of weights and demonstrations")] = None,
    steps: Annotated[int | None, typer.Option(help="without RECIPE: length of the learning rate's schedule")] = None,
    stop_after: Annotated[int | None, typer.Option(help="without RECIPE: steps taken of it")] = None,
    threads: Annotated[int | None, typer.Option(help="without RECIPE: CPU threads")] = None,
) -> None:
    """Fine-tune RECIPE's model on its training samples, on answers or on chains of thought; without RECIPE make models/tiny anew."""
    tiny = {"--seed": seed, "--steps": steps, "--stop-after": stop_after, "--threads": threads}
    given = [part for name, value in tiny.items() if value is not None for part in (name, str(value))]
    if recipe_path is None:
        if target is not None:
            raise ConfigError("--target was given without RECIPE; the tiny policy's warm start has no targets")
        _module("mars_trainer.warm_start", "--out", str(out), *given)
    elif given:
        raise ConfigError(f"{given[0]} was given with RECIPE, whose [run], [sft] and [train] say it; set it there")
    else:
        _module("mars_trainer.sft", str(recipe_path), "--out", str(out), *(["--target", target] if target else []))


@app.command(**PASSED_ON)
def score(context: typer.Context) -> None:
    """Score completions offline: mars score --recipe paper|released|FILE:FUNCTION [--released-eval] ROWS.jsonl (JSON lines to stdout)."""
    _module("mars_reward.offline", *context.args)


@app.command(**PASSED_ON)
def data(context: typer.Context) -> None:
    """Datasets: mars data check PATH [--sheet SHEET.png] [--json], mars data convert PATH OUT.jsonl (each has --help)."""
    _module("mars_trainer.data", *context.args)


@app.command(name="eval")
def evaluate(
    recipe_path: RecipePath,
    files: Annotated[
        list[Path] | None, typer.Option("--data", help="a dataset to evaluate on, any number of times; default: the recipe's")
    ] = None,
    sources: Annotated[
        str | None, typer.Option(metavar="A,B", help="with --data: source names in image order, e.g. visible,infrared")
    ] = None,
    split: Annotated[str | None, typer.Option(help="with --data: the part to read, for formats that have splits")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="samples of each dataset; default: data.eval_samples")] = None,
    released: Annotated[bool, typer.Option("--released", help="numbers as the paper's released script computes them")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="the results as one JSON object; all else goes to standard error")
    ] = False,
    port: BasePort = 8100,
) -> None:
    """Evaluate a run's newest policy (or its start, if it has none): Multi, Mono per source, Union, for each dataset."""
    if files:
        common = {"sources": sources.split(",") if sources else None, "split": split}
        os.environ["MARS_DATA__SOURCE_NAMES"] = "null"  # other datasets have other sources
        os.environ["MARS_DATA__TEST"] = json.dumps([{"path": str(path), **common} for path in files])
    elif sources or split:
        raise ConfigError("--sources and --split were given without --data; name the files that they are about, or set data.test")
    if samples is not None:
        os.environ["MARS_DATA__EVAL_SAMPLES"] = str(samples)
    recipe = load_recipe(recipe_path)
    _run(recipe_path, recipe, port, trainer="evaluate", shown_on=errors if as_json else console)
    options = [*(["--released"] if released else []), *(["--json"] if as_json else [])]
    _module("mars_trainer.results", "--recipe", str(recipe_path), *options)


def _run(recipe_path: Path, recipe: Recipe, port: int, *, trainer: TrainerMode, shown_on: Console | None = None) -> None:
    """Run a stack until its trainer has finished, which a lingering one never does."""
    display, meter = RunDisplay(shown_on or console), WorkMeter()
    tail = EventTail(recipe.run.dir / "events.jsonl", from_end=True)
    display.say(f"starting {recipe.run.name}: {recipe.rollout.replicas} rollout replica(s), logs in {recipe.run.dir}/logs")
    try:
        with _interruptible(), running_stack(recipe_path, recipe, ports=Ports(port), trainer=trainer, say=display.say) as stack:
            done = said = False
            while not done:
                stack.poll()
                display.starting(stack.supervisor.ready, len(stack.supervisor.names))
                done = stack.supervisor.finished(TRAINER)
                if trainer == "linger" and not said and stack.supervisor.all_ready:
                    said = True
                    display.say(f"serving on {service_url(load_deployment().host, port)}; Ctrl-C ends everything")
                for event in tail.new():
                    display.show(event)
                    meter.see(event, stack.supervisor.pids().values())
                time.sleep(POLL_S)
    finally:
        for event in tail.new():  # what the trainer said while it ended
            display.show(event)
        display.close()
    if meter.result is not None:
        EventLog(recipe.run.dir / "events.jsonl").write("work", **meter.result)


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends the stack as Ctrl-C does, and Ctrl-C does where a shell started us with SIGINT ignored."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _dry_run(recipe_path: Path) -> None:
    """Ask trainer and reward service, each what it can say without the other; exits with the code of the first that refuses."""
    codes = [_exit_code("mars_trainer.dry_run", "--recipe", str(recipe_path))]
    if find_spec("mars_reward") is None:
        console.print("the reward recipe is not checked, since the reward service is not installed here", highlight=False)
    else:
        codes.append(_exit_code("mars_reward", "--check", "--recipe", str(recipe_path)))
    if code := next(filter(None, codes), 0):
        raise typer.Exit(code)


def _module(name: str, *arguments: str) -> None:
    if code := _exit_code(name, *arguments):
        raise typer.Exit(code)


def _exit_code(name: str, *arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", name, *arguments]).returncode


if __name__ == "__main__":
    main()
