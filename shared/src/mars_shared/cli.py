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
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mars_shared.cli_dead import app as dead_app
from mars_shared.cli_scale import scale
from mars_shared.cli_status import status
from mars_shared.client import request_rollouts
from mars_shared.cpu import WorkMeter
from mars_shared.errors import ConfigError, MarsError
from mars_shared.progress import EventTail, RunDisplay
from mars_shared.settings import Recipe, load_deployment, load_recipe
from mars_shared.stack import TRAINER, Ports, TrainerMode, find_stack, read_state, running_stack, service_url
from mars_shared.telemetry import EventLog

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
console = Console()
errors = Console(stderr=True)

app.command()(status)
app.command()(scale)
app.add_typer(dead_app, name="dead")

POLL_S = 0.2
DEMO_DIR = "runs/demo"

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
        _module("mars_trainer.dry_run", "--recipe", str(recipe_path))
        return
    _run(recipe_path, recipe, port, trainer="once")


@app.command()
def demo(
    data: Annotated[str, typer.Option(help="digits or scene")] = "digits",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    port: BasePort = 8100,
) -> None:
    """Train the tiny policy on data that needs no download, and report before and after."""
    recipe_path = Path("recipes") / f"{data}.toml"
    if not recipe_path.is_file():
        known = sorted(path.stem for path in Path("recipes").glob("*.toml"))
        raise ConfigError(f"no recipe {recipe_path}; expected to be run in the project's folder, with --data one of {known}")
    os.environ["MARS_RUN__SEED"] = str(seed)
    os.environ["MARS_RUN__DIR"] = DEMO_DIR
    recipe = load_recipe(recipe_path)
    if recipe.run.dir.exists():
        if read_state(recipe.run.dir) is not None:
            raise ConfigError(f"a demo runs in {recipe.run.dir} already; stop it first")
        console.print(f"the demo before is kept in {_put_aside(recipe.run.dir)}", highlight=False, soft_wrap=True)
    _run(recipe_path, recipe, port, trainer="once")
    _module("mars_trainer.report", "--recipe", str(recipe_path))


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


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def score(context: typer.Context) -> None:
    """Score completions offline: mars score --recipe paper|released|FILE:FUNCTION [--released-eval] ROWS.jsonl (JSON lines to stdout)."""
    _module("mars_reward.offline", *context.args)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def data(context: typer.Context) -> None:
    """Datasets: mars data check PATH [--sheet SHEET.png], mars data convert PATH OUT.jsonl (--help after either lists all)."""
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
    _run(recipe_path, recipe, port, trainer="evaluate")
    _module("mars_trainer.results", "--recipe", str(recipe_path), *(["--released"] if released else []))


@app.command()
def rollout(
    question: Annotated[str, typer.Argument(help="what to ask about the images")],
    image: Annotated[list[str], typer.Option("--image", help="NAME=FILE, once per source, in order")],
    truth: Annotated[
        str | None, typer.Option(help="the right answer: a text, or a JSON list of boxes, each a list of x1, y1, x2, y2")
    ] = None,
    num_generations: Annotated[int | None, typer.Option("--num-generations", "-g", help="multi-source completions")] = None,
    num_mono: Annotated[int | None, typer.Option("--num-mono", "-m", help="mono-source completions of each source")] = None,
    mono_decoding: Annotated[
        str | None, typer.Option("--mono-decoding", help="sample or greedy (then --num-mono is at most 1)")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="sampling temperature")] = None,
    seed: Annotated[int | None, typer.Option(help="for the same completions again")] = None,
    url: Annotated[str | None, typer.Option(help="a rollout replica; default: of the stack that runs here")] = None,
) -> None:
    """Ask the policy about image files, with all sources and with each alone."""
    options = {
        "num_generations": num_generations,
        "num_mono": num_mono,
        "mono_decoding": mono_decoding,
        "temperature": temperature,
        "seed": seed,
    }
    answer = request_rollouts(
        url or _running_rollout_url(),
        load_deployment(),
        question=question,
        images=[_named_image(item) for item in image],
        truth=truth,
        options=options,
    )
    _print_rollouts(answer)


def _run(recipe_path: Path, recipe: Recipe, port: int, *, trainer: TrainerMode) -> None:
    """Run a stack until its trainer has finished, which a lingering one never does."""
    display, meter = RunDisplay(console), WorkMeter()
    tail = EventTail(recipe.run.dir / "events.jsonl", from_end=True)
    display.say(f"starting {recipe.run.name}: {recipe.rollout.replicas} rollout replica(s), logs in {recipe.run.dir}/logs")
    with _interruptible(), running_stack(recipe_path, recipe, ports=Ports(port), trainer=trainer, say=display.say) as stack:
        try:
            done = said = False
            while not done:
                stack.poll()
                done = stack.supervisor.finished(TRAINER)
                if trainer == "linger" and not said and stack.supervisor.all_ready:
                    said = True
                    display.say(f"serving on {service_url(load_deployment().host, port)}; Ctrl-C ends everything")
                for event in tail.new():
                    display.show(event)
                    meter.see(event, stack.supervisor.pids().values())
                time.sleep(POLL_S)
        finally:
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


def _module(name: str, *arguments: str) -> None:
    code = subprocess.run([sys.executable, "-m", name, *arguments]).returncode
    if code != 0:
        raise typer.Exit(code)


def _named_image(item: str) -> tuple[str, Path]:
    name, separator, path = item.partition("=")
    if not separator or not name or not path:
        raise ConfigError(f"--image {item!r}: expected NAME=FILE, e.g. visible=a.png")
    return name, Path(path)


def _running_rollout_url() -> str:
    _, state = find_stack(None)
    return state.url(next(iter(state.replicas.values())))


def _print_rollouts(answer: dict[str, Any]) -> None:
    group, scores = answer["group"], answer["scores"]
    scored = scores is not None
    version = group["policy_version"]
    table = Table(title=f"policy {version['incarnation']}.{version['step']}")
    for column in ("kind", "source", "completion", *(("reward", "parts") if scored else ())):
        table.add_column(column, overflow="fold")
    for index, completion in enumerate(group["completions"]):
        row = [completion["kind"], completion["source"] or "all", completion["text"]]
        if scored:
            row += _reward_cells(scores[index])
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    if answer.get("gain") is not None:
        console.print(f"gain (mean multi-source minus mean mono-source reward): {answer['gain']:+.3f}")


def _reward_cells(score: dict[str, Any]) -> list[str]:
    if "error" in score:
        return ["none", score["error"]]
    return [f"{score['reward']:.3f}", "  ".join(f"{name} {value:.2f}" for name, value in score["parts"].items())]


if __name__ == "__main__":
    main()
