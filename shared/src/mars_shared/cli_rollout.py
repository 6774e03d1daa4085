"""`mars rollout`: ask a running replica about image files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mars_shared.bars import waiting
from mars_shared.client import request_rollouts
from mars_shared.errors import ConfigError
from mars_shared.settings import load_deployment
from mars_shared.stack import find_stack
from mars_shared.terminal import printable_lines

console = Console()


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
    as_json: Annotated[bool, typer.Option("--json", help="the whole answer of POST /v1/rollouts as a JSON object")] = False,
) -> None:
    """Ask the policy about image files, with all sources and with each alone."""
    options = {
        "num_generations": num_generations,
        "num_mono": num_mono,
        "mono_decoding": mono_decoding,
        "temperature": temperature,
        "seed": seed,
    }
    images = [_named_image(item) for item in image]
    with waiting("the policy answers"):
        answer = request_rollouts(
            url or _running_rollout_url(),
            load_deployment(),
            question=question,
            images=images,
            truth=truth,
            options=options,
        )
    if as_json:
        typer.echo(json.dumps(answer))
    else:
        _print_rollouts(answer)


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
        table.add_row(*(Text(printable_lines(cell)) for cell in row))
    console.print(table)
    if answer.get("gain") is not None:
        console.print(f"gain (mean multi-source minus mean mono-source reward): {answer['gain']:+.3f}")


def _reward_cells(score: dict[str, Any]) -> list[str]:
    if "error" in score:
        return ["none", score["error"]]
    return [f"{score['reward']:.3f}", "  ".join(f"{name} {value:.2f}" for name, value in score["parts"].items())]
