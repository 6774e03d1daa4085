"""`mars ui`: the page of a run, live or long ended."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import uvicorn
from rich.console import Console

from mars_shared.errors import ConfigError
from mars_shared.http import bind
from mars_shared.settings import load_deployment
from mars_shared.ui.app import build_app

console = Console()


def ui(
    run_dir: Annotated[Path, typer.Argument(help="a run folder, e.g. runs/demo")],
    port: Annotated[int, typer.Option(min=1, max=65_535, help="where the page is served")] = 8400,
) -> None:
    """Show a run in a browser: curves, and every group with all of its sources. Reads the run's files alone; Ctrl-C ends it."""
    if not (run_dir / "events.jsonl").is_file():
        raise ConfigError(f"{run_dir} is no run folder: it has no events.jsonl; expected one such as runs/demo")
    deployment = load_deployment()
    app = build_app(run_dir, deployment)
    with bind(deployment.host, port) as listener:
        console.print(f"{run_dir} is at http://{deployment.host}:{port}/ (Ctrl-C ends it)", highlight=False, soft_wrap=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])
