"""The reward service over HTTP: scores, statuses, and errors that name the item."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import httpx
import pytest

from log_lines import logged
from mars_reward.app import build_app
from mars_reward.registry import RECIPES, Parts, offered, score, to_score
from mars_shared.contracts import ScoreItem, TextTruth
from mars_shared.errors import ConfigError, RewardNotFiniteError
from mars_shared.settings import Deployment
from reward_traps import SPEC

TEXT_ITEM = {"completion": "<think>r</think><answer>two</answer>", "truth": {"kind": "text", "text": "two or 2"}}
BOX_ITEM = {
    "completion": '<think>r</think><answer>```json\n[{"bbox_2d": [0, 0, 10, 10]}]\n```</answer>',
    "truth": {"kind": "boxes", "boxes": [[0, 0, 20, 20]], "width_px": 100, "height_px": 100},
    "frame": {"kind": "original", "width": 100, "height": 100},
}


def call(method: str, path: str, *, ready: str | None = None, key: str | None = None, **request: Any) -> httpx.Response:
    deployment = Deployment.model_validate({"api_key": key} if key else {})

    async def ask() -> httpx.Response:
        app = build_app(deployment, recipe="paper", ready=lambda: ready)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8200") as client:
            return await client.request(method, path, **request)

    return asyncio.run(ask())


def message(response: httpx.Response) -> str:
    return str(response.json()["error"]["message"])


def test_a_batch_is_scored_in_order_with_its_parts() -> None:
    response = call("POST", "/v1/score", json={"items": [TEXT_ITEM, BOX_ITEM, TEXT_ITEM | {"completion": "two"}]})
    assert response.status_code == 200
    # The box covers 100 of the object's 400 pixels.
    assert response.json() == {
        "schema_version": 1,
        "recipe": "paper",
        "scores": [
            {"reward": 1.5, "parts": {"format": 0.5, "accuracy": 1.0}, "parsed": True, "boxes": []},
            {"reward": 1.0, "parts": {"format": 0.75, "iou": 0.25}, "parsed": True, "boxes": [[0, 0, 10, 10]]},
            {"reward": 0.0, "parts": {"format": 0.0, "accuracy": 0.0}, "parsed": False, "boxes": []},
        ],
    }


def test_a_box_item_without_frame_is_refused_by_its_index() -> None:
    response = call("POST", "/v1/score", json={"items": [TEXT_ITEM, BOX_ITEM | {"frame": None}]})
    assert response.status_code == 422
    assert "items.1: frame is missing" in message(response)


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([TEXT_ITEM, TEXT_ITEM, {"completion": "x"}], "items.2.truth"),
        ([TEXT_ITEM, TEXT_ITEM | {"completion": 7}], "items.1.completion"),
        ([BOX_ITEM | {"truth": {"kind": "boxes", "boxes": [[9, 0, 1, 5]], "width_px": 9, "height_px": 9}}], "box 0 is (9.0"),
        ([BOX_ITEM | {"truth": {"kind": "mask"}}], "items.0.truth"),
        ([], "items"),
    ],
)
def test_an_invalid_item_is_refused_by_its_index_and_field(items: list[Mapping[str, Any]], expected: str) -> None:
    response = call("POST", "/v1/score", json={"items": items})
    assert response.status_code == 422
    assert expected in message(response)


@pytest.mark.parametrize(
    ("request_body", "status"),
    [(b"{", 422), (b"[" * 100_000, 400), (b"", 422), (b'{"items": [{"completion": "\\ud800", "truth": null}]}', 422)],
)
def test_a_body_that_is_no_request_is_refused(request_body: bytes, status: int) -> None:
    response = call("POST", "/v1/score", content=request_body, headers={"content-type": "application/json"})
    assert response.status_code == status


def test_an_unknown_recipe_is_refused_with_the_known_ones() -> None:
    response = call("POST", "/v1/score", json={"items": [TEXT_ITEM], "recipe": "mine"})
    assert response.status_code == 400
    assert "'mine'" in message(response) and "paper" in message(response)


def test_a_service_with_an_unknown_recipe_does_not_start() -> None:
    with pytest.raises(ConfigError, match="expected one of paper"):
        build_app(Deployment(), recipe="mine", ready=lambda: None)


def test_a_hostile_batch_is_answered_and_other_items_keep_their_scores() -> None:
    hostile = BOX_ITEM | {"completion": "<answer>```json\n" + "[" * 200_000 + "\n```</answer>"}
    response = call("POST", "/v1/score", json={"items": [hostile, BOX_ITEM]})
    assert [item["reward"] for item in response.json()["scores"]] == [0.5, 1.0]


def test_the_key_guards_scores_and_metrics_but_not_health() -> None:
    body = {"items": [TEXT_ITEM]}
    assert call("POST", "/v1/score", key="k", json=body).status_code == 401
    assert call("POST", "/v1/score", key="k", json=body, headers={"authorization": "Bearer k"}).status_code == 200
    assert call("GET", "/metrics", key="k").status_code == 401
    assert call("GET", "/healthz", key="k").status_code == 200


def test_readiness_says_why_not() -> None:
    assert call("GET", "/readyz").status_code == 200
    response = call("GET", "/readyz", ready="no answer from Redis")
    assert (response.status_code, message(response)) == (503, "no answer from Redis")


def test_metrics_count_items_by_kind_of_truth() -> None:
    def count() -> float:
        name = 'mars_reward_items_total{truth="boxes",via="http"} '
        lines = call("GET", "/metrics").text.splitlines()
        return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))

    before = count()
    call("POST", "/v1/score", json={"items": [BOX_ITEM, TEXT_ITEM, BOX_ITEM]})
    assert count() == before + 2
    assert 'mars_reward_seconds_count{via="http"}' in call("GET", "/metrics").text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_an_error_that_names_its_part(value: float) -> None:
    with pytest.raises(RewardNotFiniteError, match=r"reward part 'iou' is (nan|inf)"):
        to_score(Parts({"format": 0.5, "iou": value}, parsed=True))


def test_an_item_whose_reward_fails_has_its_error_in_its_place_and_the_others_keep_their_scores() -> None:
    completions = ["fine", "raise", "exit", "nan", "loop", "fine"]
    truth = {"kind": "text", "text": "7"}
    with offered(SPEC, time_limit_s=0.5):
        items = [{"completion": completion, "truth": truth} for completion in completions]
        response = call("POST", "/v1/score", json={"items": items, "recipe": SPEC})
    assert response.status_code == 200
    scores = response.json()["scores"]
    fine = {"reward": 1.0, "parts": {"trap": 1.0}, "parsed": True, "boxes": []}
    assert scores[0] == scores[5] == fine
    assert [list(found) for found in scores[1:5]] == [["error"]] * 4
    assert scores[1]["error"] == f"items.1: reward {SPEC!r} failed: KeyError: 'no such thing'"
    assert scores[2]["error"] == f"items.2: reward {SPEC!r} ended its process (exit code 0)"
    assert scores[3]["error"] == "items.3: reward part 'trap' is nan; expected a finite number"
    assert scores[4]["error"] == f"items.4: reward {SPEC!r} used more than 0.5 CPU seconds (reward.time_limit_s)"


def test_every_recipe_scores_every_kind_of_truth() -> None:
    assert set(RECIPES) == {"paper", "released"}
    assert all(set(scorers) == {"boxes", "text"} for scorers in RECIPES.values())


def test_the_reward_is_the_sum_of_its_parts() -> None:
    found = score(ScoreItem(completion="<think>r</think><answer>3</answer>", truth=TextTruth(text="2")), "paper")
    assert (found.reward, found.parts, found.parsed) == (0.5, {"format": 0.5, "accuracy": 0.0}, True)


def test_a_request_that_names_a_group_is_logged_under_its_id() -> None:
    with logged() as lines:
        for headers in ({"x-mars-group": "adhoc-7"}, {}):
            call("POST", "/v1/score", json={"items": [TEXT_ITEM]}, headers=headers)
    assert lines.of("adhoc-7") == ["scored over HTTP"]
    assert [entry.get("group") for entry in lines.entries if entry["message"] == "scored over HTTP"] == ["adhoc-7", None]
