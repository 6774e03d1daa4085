"""The trainer's HTTP face: GET /v1/run says where the run is, /v1/weights serves the weights store."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import FastAPI
from prometheus_client import Gauge

from mars_shared.http import create_app
from mars_shared.settings import Deployment
from mars_shared.weights import WeightsStore
from mars_trainer.loop import Progress
from mars_trainer.weights_app import weights_routes

STEP = Gauge("mars_step", "Optimizer steps done", ["run"])
METRIC = Gauge("mars_train_metric", "Metrics of the last step by name", ["run", "name"])


def build_app(deployment: Deployment, progress: Progress, weights: WeightsStore | None = None) -> FastAPI:
    """The app; `progress` is read whenever it is asked, and `weights` served if there are any."""
    app = create_app(
        "mars trainer", deployment, ready=lambda: "the first version is not published" if progress.state == "starting" else None
    )

    if weights is not None:
        app.include_router(weights_routes(weights))

    @app.get("/v1/run")
    async def run() -> dict[str, Any]:
        """Run, state, version, next dispatch index, last step's metrics, evaluations, versions by replica."""
        return asdict(progress) | {"version": str(progress.version), "step": progress.version.step}

    @app.middleware("http")
    async def gauges(request: Any, call_next: Any) -> Any:
        if request.url.path == "/metrics":
            STEP.labels(progress.run).set(progress.version.step)
            METRIC.clear()  # a skipped step has no loss; the last one's must not stand for it
            for name, value in progress.metrics.items():
                METRIC.labels(progress.run, name).set(value)
        return await call_next(request)

    return app
