"""The trainer's HTTP face: GET /v1/run says where the run is, /v1/weights serves the weights store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI

from mars_shared.gpu import gpu_memory
from mars_shared.http import create_app
from mars_shared.records.state import RunState
from mars_shared.settings import Deployment
from mars_shared.weights import WeightsStore
from mars_trainer.exposition import RunCollector
from mars_trainer.progress import Progress
from mars_trainer.weights_app import weights_routes


def build_app(
    deployment: Deployment,
    progress: Progress,
    weights: WeightsStore | None = None,
    look: Callable[[], RunState | None] = lambda: None,
) -> FastAPI:
    """The app; `progress` and `look` are read whenever it is asked, and `weights` served if there are any."""
    app = create_app(
        "mars trainer",
        deployment,
        ready=lambda: "the first version is not published" if progress.state == "starting" else None,
        collectors=[RunCollector(progress, look), gpu_memory()],
    )

    if weights is not None:
        app.include_router(weights_routes(weights))

    @app.get("/v1/run")
    async def run() -> dict[str, Any]:
        """Run, state, version, next dispatch index, last step's metrics, evaluations, versions by replica."""
        return asdict(progress) | {"version": str(progress.version), "step": progress.version.step}

    return app
