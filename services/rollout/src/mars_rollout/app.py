"""The HTTP face of a replica: ad-hoc groups, the served version, and vLLM's OpenAI routes beside them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from mars_rollout.adhoc import AdhocPrompts, GroupAnswer, GroupRequest, RewardClient, parse_form, parse_json
from mars_rollout.engine.base import Engine
from mars_rollout.group import GroupMaker
from mars_rollout.metrics import count_group
from mars_rollout.policy import Policy
from mars_rollout.worker import log_made
from mars_shared.contracts import Prompt
from mars_shared.errors import InputError, MarsError, MediaTypeError, NotReadyError
from mars_shared.gpu import gpu_memory
from mars_shared.http import create_app
from mars_shared.logs import logged_group
from mars_shared.settings import Deployment

logger = logging.getLogger(__name__)

MAX_FORM_FIELDS = 32
MAX_FORM_FILES = 64


class Stage:
    """What the routes need of a replica; `engine` and `maker` are None until it has started."""

    def __init__(self, replica: str, prompts: AdhocPrompts, rewards: RewardClient) -> None:
        self.replica = replica
        self.prompts = prompts
        self.rewards = rewards
        self.engine: Engine | None = None
        self.maker: GroupMaker | None = None
        self.policy: Policy | None = None


def build_app(deployment: Deployment, stage: Stage, *, ready: Callable[[], str | None]) -> FastAPI:
    """A replica's app; answers 503 where the engine is needed and not there yet.

    Raises:
        ConfigError: it would serve beyond loopback without a key.
    """
    app = create_app("mars rollout service", deployment, ready=ready, collectors=[gpu_memory()])

    @app.post("/v1/rollouts", openapi_extra={"requestBody": _body_schema()})
    async def make_group(request: Request) -> GroupAnswer:
        """Answer a question about named images with a whole group, scored if a truth is given."""
        if stage.maker is None:
            raise NotReadyError("the engine is starting; ask again once /readyz answers 200")
        prompt = await asyncio.to_thread(stage.prompts.prompt, await _read(request))
        with logged_group(prompt.task_id):
            return await _answer(prompt, stage.maker, stage.rewards)

    @app.get("/v1/version")
    async def version() -> dict[str, str]:
        """The policy version that answers from here on and how the replica came to it, e.g. {"version": "1.7", ...}."""
        if stage.engine is None or stage.policy is None:
            raise NotReadyError("the engine is starting; ask again once /readyz answers 200")
        served = {"version": str(stage.engine.version), "weights_id": stage.engine.weights_id, "reached_by": stage.policy.arrival}
        return {"replica": stage.replica, **served}

    @app.post("/v1/version/verify")
    async def verify() -> dict[str, str]:
        """Compare every weight of the engine with the published version, bit by bit; 500 names what differs."""
        if stage.engine is None or stage.policy is None:
            raise NotReadyError("the engine is starting; ask again once /readyz answers 200")
        await stage.policy.verify()
        return {"replica": stage.replica, "version": str(stage.engine.version), "weights": "equal"}

    return app


def mount_openai(app: FastAPI, openai_app: ASGIApp) -> None:
    """Serve vLLM's app for every path that is not ours; the guard stands before both."""
    app.mount("/", openai_app)


async def _answer(prompt: Prompt, maker: GroupMaker, rewards: RewardClient) -> GroupAnswer:
    """The group with its scores; the log says what became of it, since no stream and no record does."""
    logger.info("asked over HTTP")
    try:
        group = await maker.make(prompt)
        log_made(group)
        count_group(group)
        return await rewards.answer(group)
    except MarsError as error:
        logger.warning("not answered: %s: %s", type(error).__name__, error)
        raise


async def _read(request: Request) -> GroupRequest:
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type == "application/json":
        return parse_json(await request.body())
    if media_type == "multipart/form-data":
        return await _read_form(request)
    raise MediaTypeError(f"content type {media_type!r}: expected application/json or multipart/form-data")


async def _read_form(request: Request) -> GroupRequest:
    try:
        form: FormData = await request.form(max_files=MAX_FORM_FILES, max_fields=MAX_FORM_FIELDS)
    except HTTPException as error:
        raise InputError(f"form: {error.detail}") from error
    fields = [(name, value) for name, value in form.multi_items() if isinstance(value, str)]
    files = [(name, await value.read()) for name, value in form.multi_items() if isinstance(value, UploadFile)]
    return parse_form(fields, files)


def _body_schema() -> dict[str, Any]:
    schema = GroupRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    return {"required": True, "content": {"application/json": {"schema": schema}}}
