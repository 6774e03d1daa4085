"""What an ad-hoc request becomes before any engine sees it, and how a replica answers what it does not serve."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse

from builders import image_bytes, make_group, make_prompt
from log_lines import logged
from mars_rollout.adhoc import AdhocPrompts, GroupAnswer, GroupRequest
from mars_rollout.app import build_app, mount_openai
from mars_shared.blobs import BlobStore
from mars_shared.contracts import BoxesTruth, Prompt, RolloutGroup
from mars_shared.errors import InputError, NotReadyError
from mars_shared.http import shape_missing_routes
from mars_shared.settings import Deployment, load_recipe

pytestmark = pytest.mark.usefixtures("clean_environment")


def request_about(folder: Path, boxes: list[list[float]]) -> tuple[AdhocPrompts, GroupRequest]:
    """A request with a first image of 60 x 40 pixels and a larger second one."""
    blobs = BlobStore(folder / "blobs")
    sources = [{"name": name, "image": blobs.put(image_bytes(size))} for name, size in (("a", (60, 40)), ("b", (90, 90)))]
    request = GroupRequest.model_validate({"question": "Where?", "sources": sources, "truth": boxes})
    return AdhocPrompts(load_recipe(Path(__file__).parent.parent / "recipes/scene.toml"), blobs), request


@pytest.mark.parametrize(
    ("box", "told"),
    [
        ([10, 10, 61, 20], "(10, 10, 61, 20)"),
        ([10, 10, 20, 41], "(10, 10, 20, 41)"),
        ([-1, 10, 20, 20], "(-1, 10, 20, 20)"),
        ([20, 10, 10, 20], "(20, 10, 10, 20)"),
    ],
)
def test_a_truth_box_outside_the_first_image_is_refused_with_the_box_and_the_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path, box: list[float], told: str
) -> None:
    monkeypatch.chdir(root)
    prompts, request = request_about(tmp_path, [[0, 0, 60, 40], box])
    with pytest.raises(InputError) as caught:
        prompts.prompt(request)
    expected = f"truth: box 1 is {told}; expected x1 < x2 and y1 < y2 inside the image of 60 x 40 pixels"
    assert str(caught.value) == expected and caught.value.http_status == 422


def test_a_truth_box_may_fill_the_first_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.chdir(root)
    prompts, request = request_about(tmp_path, [[0, 0, 60, 40]])
    truth = prompts.prompt(request).truth
    assert isinstance(truth, BoxesTruth) and (truth.width_px, truth.height_px) == (60, 40)


async def test_an_unknown_route_beside_another_app_has_the_one_shape_of_errors() -> None:
    inner = FastAPI()

    async def in_its_own_shape(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"theirs": str(error)}, status_code=400)

    @inner.get("/v1/models")
    async def models() -> None:
        raise HTTPException(400, "no model")

    inner.add_exception_handler(HTTPException, in_its_own_shape)
    shape_missing_routes(inner)
    stage: Any = None
    app = build_app(Deployment(), stage, ready=lambda: None)
    mount_openai(app, inner)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as client:
        unknown, wrong_method = await client.get("/nowhere"), await client.post("/v1/models")
        own = await client.get("/v1/models")
    assert (unknown.status_code, unknown.json()) == (404, {"error": {"type": "HTTPError", "message": "Not Found"}})
    assert (wrong_method.status_code, wrong_method.json()["error"]["type"]) == (405, "HTTPError")
    assert "theirs" in own.json()


async def test_an_adhoc_group_is_logged_under_its_id_from_question_to_scores_or_to_its_failure(tmp_path: Path) -> None:
    group = make_group(make_prompt(7))

    async def make(prompt: Prompt) -> RolloutGroup:
        if prompt.task_id != group.group_id:
            raise NotReadyError("the engine is dead")
        return group

    async def answer(made: RolloutGroup) -> GroupAnswer:
        return GroupAnswer(group=made)

    asked = iter((group.prompt, make_prompt(8)))
    stage: Any = SimpleNamespace(
        maker=SimpleNamespace(make=make),
        prompts=SimpleNamespace(prompt=lambda request: next(asked)),
        rewards=SimpleNamespace(answer=answer),
    )
    app = build_app(Deployment(), stage, ready=lambda: None)
    body = {"question": "Which?", "sources": [{"name": "visible", "image": "0" * 64}]}
    with logged() as lines:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as client:
            statuses = [(await client.post("/v1/rollouts", json=body)).status_code for _ in range(2)]
    assert statuses == [200, 503]
    assert lines.of("train-00000007") == ["asked over HTTP", "made the group"]
    assert lines.of("train-00000008") == ["asked over HTTP", "not answered: NotReadyError: the engine is dead"]
