"""The HTTP face: POST /v1/score scores a batch, in order."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Annotated

from fastapi import FastAPI, Header

from mars_reward.metrics import ITEMS, SECONDS
from mars_reward.registry import check_recipe, score
from mars_shared.contracts import Score, ScoreItem, ScoreRequest, ScoreResponse, Unscored
from mars_shared.errors import RewardError
from mars_shared.http import create_app
from mars_shared.logs import GROUP_HEADER, logged_group
from mars_shared.settings import Deployment

logger = logging.getLogger(__name__)


def build_app(deployment: Deployment, *, recipe: str, ready: Callable[[], str | None]) -> FastAPI:
    """The reward service's app.

    Args:
        recipe: scores requests that name none.
        ready: returns None when the service can serve, else why not.

    Raises:
        ConfigError: unknown recipe, or it would serve beyond loopback without a key.
    """
    default_recipe = check_recipe(recipe)
    app = create_app("mars reward service", deployment, ready=ready)

    # Not `async`: FastAPI runs it in a thread, so that scoring never holds up the event loop.
    @app.post("/v1/score")
    def score_batch(
        request: ScoreRequest, group: Annotated[str | None, Header(alias=GROUP_HEADER, max_length=200)] = None
    ) -> ScoreResponse:
        """Score every item; one whose reward fails has an error in its place, a wrong one refuses the batch by its index."""
        with logged_group(group), SECONDS.labels(via="http").time():
            response = score_request(request, default_recipe)
            logger.info("scored over HTTP", extra={"completions": len(response.scores)})
            return response

    return app


def score_request(request: ScoreRequest, default_recipe: str) -> ScoreResponse:
    """Scores in the order of the items.

    Raises:
        ConfigError: the request names an unknown recipe.
        InputError: an item is wrong; the message names its index.
    """
    recipe = check_recipe(request.recipe or default_recipe)
    scores = tuple(_score_or_error(item, recipe, what=f"items.{index}") for index, item in enumerate(request.items))
    for item, found in zip(request.items, scores, strict=True):
        if isinstance(found, Score):
            ITEMS.labels(via="http", truth=item.truth.kind).inc()
    return ScoreResponse(recipe=recipe, scores=scores)


def _score_or_error(item: ScoreItem, recipe: str, *, what: str) -> Score | Unscored:
    try:
        return score(item, recipe, what=what)
    except RewardError as error:
        logger.warning("%s", error.detail)
        return Unscored(error=str(error))
