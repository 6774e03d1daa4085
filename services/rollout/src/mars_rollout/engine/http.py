"""vLLM's own OpenAI app around our engine, reduced to the routes that only ask."""

from __future__ import annotations

import json
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.types import ASGIApp
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.utils.argparse_utils import FlexibleArgumentParser

from mars_rollout.engine.environment import MEDIA_CONNECTOR
from mars_rollout.engine.llm import SERVED_NAME
from mars_rollout.engine.vllm import VllmEngine
from mars_shared.http import error_body
from mars_shared.settings import Recipe

OPENAI_ROUTES = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize", "/health"})
"""All that is served of vLLM's app: nothing that changes weights, adapters, profiling or sleep."""


PROCESSOR_ARGUMENTS = "mm_processor_kwargs"


@MEDIA_CONNECTOR_REGISTRY.register(MEDIA_CONNECTOR)
class DataUrlConnector(MediaConnector):
    """Reads data: URLs and nothing else: no request of ours goes out, no file is read."""

    def load_from_url(self, url: str, *args: Any, **kwargs: Any) -> Any:
        """Raises VLLMValidationError (HTTP 400) for any other URL."""
        _refuse_other_urls(url)
        return super().load_from_url(url, *args, **kwargs)

    async def load_from_url_async(self, url: str, *args: Any, **kwargs: Any) -> Any:
        """Raises VLLMValidationError (HTTP 400) for any other URL."""
        _refuse_other_urls(url)
        return await super().load_from_url_async(url, *args, **kwargs)


def _refuse_other_urls(url: str) -> None:
    if url[:5].lower() != "data:":
        raise VLLMValidationError(f"image URL {url[:60]!r}: only data: URLs are read; expected data:image/png;base64,...")


async def refuse_what_is_not_served(request: Request, call_next: RequestResponseEndpoint) -> Response:
    """Answer 404 to other routes, and 400 to mm_processor_kwargs: they could raise the pixel limit, and so take the memory."""
    if request.url.path not in OPENAI_ROUTES:
        return JSONResponse(error_body("HTTPError", "Not Found"), status_code=404)
    if request.method == "POST" and PROCESSOR_ARGUMENTS in _keys(await request.body()):
        message = f"{PROCESSOR_ARGUMENTS} are not accepted; images are processed as in training"
        return JSONResponse(error_body("InputError", message), status_code=400)
    return await call_next(request)


def _keys(body: bytes) -> Collection[str]:
    """A JSON object's keys; none if the body is something else, which vLLM refuses by itself."""
    try:
        content = json.loads(body)
    except ValueError:
        return ()
    return content.keys() if isinstance(content, dict) else ()


async def build_openai_app(engine: VllmEngine, recipe: Recipe) -> ASGIApp:
    """An ASGI app with the OPENAI_ROUTES; the model is called "policy", or by the run's name."""
    llm = engine.llm
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(
        ["--model", str(recipe.model.path), "--served-model-name", SERVED_NAME, recipe.run.name]
    )
    arguments.enable_log_requests = False
    tasks = await llm.get_supported_tasks()
    app: FastAPI = build_app(arguments, tasks, llm.model_config)
    await init_app_state(llm, app.state, arguments, tasks)
    # vLLM stops its server here when the engine dies; the replica watches the engine itself.
    app.state.server = SimpleNamespace(should_exit=False)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in OPENAI_ROUTES]
    return BaseHTTPMiddleware(app, dispatch=refuse_what_is_not_served)
