"""A whole replica over HTTP, as its users meet it: ad-hoc groups, chat, and every way to ask wrongly."""

from __future__ import annotations

import base64
import re
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from mars_rollout.adhoc import GroupAnswer
from mars_shared.contracts import PolicyVersion, ScoredGroup
from mars_shared.queue import Queue, Streams
from rollout_fixtures import MAX_MODEL_LEN, History, ReplicaProcess, RunFolder, make_prompt, png

pytestmark = pytest.mark.engine
QUESTION = {"question": "Which digit?"}


@pytest.fixture(scope="module")
def client(replica: ReplicaProcess) -> httpx.Client:
    return httpx.Client(base_url=replica.url, timeout=60, trust_env=False)


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def body(**changes: Any) -> dict[str, Any]:
    sources = [{"name": "visible", "image": data_url(png(0))}, {"name": "infrared", "image": data_url(png(1))}]
    return QUESTION | {"sources": sources, "max_completion_length": 8} | changes


def test_a_group_of_uploaded_images_is_answered_and_scored(client: httpx.Client) -> None:
    response = client.post("/v1/rollouts", json=body(truth="7", num_generations=3, num_mono=2))
    assert response.status_code == 200, response.text
    answer = GroupAnswer.model_validate_json(response.content)
    assert [c.kind for c in answer.group.completions] == ["multi"] * 3 + ["mono"] * 4
    assert [c.source for c in answer.group.completions[3:]] == ["visible", "visible", "infrared", "infrared"]
    assert answer.scores is not None and len(answer.scores) == 7
    rewards = [score.reward for score in answer.scores]
    assert answer.gain == pytest.approx(sum(rewards[:3]) / 3 - sum(rewards[3:]) / 4)
    assert answer.group.policy_version == PolicyVersion(incarnation=1, step=10)


def test_the_same_seed_answers_alike_and_another_does_not(client: httpx.Client) -> None:
    def texts(seed: int) -> list[str]:
        group = GroupAnswer.model_validate_json(client.post("/v1/rollouts", json=body(seed=seed)).content).group
        return [completion.text for completion in group.completions]

    assert texts(1) == texts(1) != texts(2)


def test_without_a_truth_there_are_no_scores(client: httpx.Client) -> None:
    answer = client.post("/v1/rollouts", json=body()).json()
    assert answer["scores"] is None and answer["gain"] is None


def test_curl_sends_files_by_source_name(replica: ReplicaProcess, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "b.png").write_bytes(png(1))
    parts = ["visible=@a.png", "infrared=@b.png", "question=Which digit?", "truth=7", "num_generations=2"]
    form = [word for part in parts for word in ("-F", part)]
    done = subprocess.run(["curl", "-sS", *form, f"{replica.url}/v1/rollouts"], cwd=tmp_path, capture_output=True, check=True)
    answer = GroupAnswer.model_validate_json(done.stdout)
    assert [source.name for source in answer.group.prompt.sources] == ["visible", "infrared"]
    assert answer.scores is not None and len(answer.scores) == 2 + 2 * 1


def test_boxes_can_be_the_truth(client: httpx.Client) -> None:
    as_json = client.post("/v1/rollouts", json=body(truth=[[1, 2, 30, 40]]))
    files = {"visible": ("a.png", png(0))}
    as_form = client.post("/v1/rollouts", data=QUESTION | {"truth": "[[1, 2, 30, 40]]"}, files=files)
    for response in (as_json, as_form):
        truth = GroupAnswer.model_validate_json(response.content).group.prompt.truth
        assert truth is not None and truth.model_dump() == {
            "kind": "boxes",
            "boxes": ((1, 2, 30, 40),),
            "width_px": 56,
            "height_px": 56,
        }


def test_a_stored_blob_can_be_named(client: httpx.Client, run_folder: RunFolder) -> None:
    blob = run_folder.blobs.put(png(3))
    response = client.post("/v1/rollouts", json=body(sources=[{"name": "visible", "image": blob}]))
    assert response.status_code == 200, response.text


ONE = {"name": "visible", "image": data_url(png(0))}
WRONG: dict[str, tuple[dict[str, Any], int, str]] = {
    "no source": (body(sources=[]), 422, "sources"),
    "no question": ({"sources": [ONE]}, 422, "question"),
    "unknown field": (body(num_generatoins=3), 422, "num_generatoins"),
    "a name twice": (body(sources=[ONE, ONE]), 422, r"\['visible'\] were given more than once"),
    "a bad name": (body(sources=[ONE | {"name": "<|image_pad|>"}]), 422, "sources.0.name"),
    "special token": (body(question="<|im_end|>"), 422, "special token"),
    "too long": (body(question="word " * MAX_MODEL_LEN), 422, f"expected at most {MAX_MODEL_LEN}"),
    "wrong type": (body(temperature="hot"), 422, "temperature"),
    "no completion": (body(num_generations=0), 422, "num_generations"),
    "greedy twice": (body(mono_decoding="greedy", num_mono=2), 422, "greedy"),
    "empty truth": (body(truth=""), 422, "truth"),
    "1 x 1": (body(sources=[ONE | {"image": data_url(png(0, 1, 1))}]), 422, "'visible': 1 x 1"),
    "truncated": (body(sources=[ONE | {"image": data_url(png(0)[:999])}]), 422, "'visible': cannot be decoded"),
    "too many pixels": (body(sources=[ONE | {"image": data_url(png(0, 600, 600))}]), 413, "'visible': 600 x 600"),
    "not an image": (body(sources=[ONE | {"image": data_url(b"GIF89a")}]), 415, "'visible': not an image"),
    "missing blob": (body(sources=[ONE | {"image": "0" * 64}]), 404, "blob 000"),
    "a URL": (body(sources=[ONE | {"image": "http://127.0.0.1:1/a.png"}]), 422, "'visible': .*never fetched"),
    "a file": (body(sources=[ONE | {"image": "file:///etc/passwd"}]), 422, "'visible': .*never fetched"),
    "no base64": (body(sources=[ONE | {"image": "data:image/png;base64,%%"}]), 422, "'visible': the data URL"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_gets_one_clear_error(name: str, client: httpx.Client) -> None:
    request, status, message = WRONG[name]
    response = client.post("/v1/rollouts", json=request)
    assert response.status_code == status, response.text
    assert re.search(message, response.json()["error"]["message"]), response.text


def test_other_content_types_and_broken_bodies_are_refused(client: httpx.Client) -> None:
    assert client.post("/v1/rollouts", content=b"x", headers={"content-type": "text/plain"}).status_code == 415
    assert client.post("/v1/rollouts", content=b"{", headers={"content-type": "application/json"}).status_code == 422
    form = {"content-type": "multipart/form-data; boundary=y"}
    assert client.post("/v1/rollouts", content=b"x", headers=form).status_code == 422
    twice = client.post("/v1/rollouts", files=[("question", (None, "a")), ("question", (None, "b")), ("v", ("v", png(0)))])
    assert twice.status_code == 422 and "question" in twice.text


def test_a_body_over_the_limit_is_refused(client: httpx.Client) -> None:
    assert client.post("/v1/rollouts", content=b" " * (65 * 2**20)).status_code == 413


def test_the_openai_client_asks_the_current_policy_with_an_image(replica: ReplicaProcess) -> None:
    openai = OpenAI(base_url=f"{replica.url}/v1", api_key="unused", http_client=httpx.Client(trust_env=False))
    content: Any = [{"type": "image_url", "image_url": {"url": data_url(png(0))}}, {"type": "text", "text": "Which digit?"}]
    answer = openai.chat.completions.create(model="policy", messages=[{"role": "user", "content": content}], max_tokens=4)
    assert answer.choices[0].message.content
    assert {model.id for model in openai.models.list()} == {"policy", "rollout-test"}


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/a.png", "https://example.org/a.png", "file:///etc/passwd"])
def test_chat_fetches_no_image(url: str, client: httpx.Client) -> None:
    content = [{"type": "image_url", "image_url": {"url": url}}]
    request = {"model": "policy", "messages": [{"role": "user", "content": content}], "max_tokens": 1}
    response = client.post("/v1/chat/completions", json=request)
    assert response.status_code == 400
    assert "only data: URLs" in response.json()["error"]["message"]


def test_chat_takes_no_arguments_for_the_image_processor(client: httpx.Client) -> None:
    request = {"model": "policy", "messages": [{"role": "user", "content": "mm_processor_kwargs?"}], "max_tokens": 1}
    assert client.post("/v1/chat/completions", json=request).status_code == 200
    response = client.post("/v1/chat/completions", json=request | {"mm_processor_kwargs": {"max_pixels": 10**9}})
    assert response.status_code == 400
    assert "mm_processor_kwargs are not accepted" in response.json()["error"]["message"]


def test_routes_that_change_the_engine_are_not_there(client: httpx.Client) -> None:
    for path in (
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/sleep",
        "/wake_up",
        "/pause",
        "/update_weights",
        "/init_weight_transfer_engine",
        "/collective_rpc",
        "/start_profile",
        "/scale_elastic_ep",
        "/reset_prefix_cache",
        "/invocations",
        "/server_info",
    ):
        missing = client.post(path, json={})
        assert missing.status_code == 404, path
        assert missing.json().get("error", {}).get("type") == "HTTPError", (path, missing.json())
        assert client.get(path).status_code in (404, 405), path


def test_a_foreign_host_name_is_refused_without_a_key(client: httpx.Client) -> None:
    for path in ("/v1/version", "/v1/models", "/v1/chat/completions", "/metrics"):
        assert client.get(path, headers={"host": "evil.example"}).status_code == 403


def test_version_health_and_metrics_are_there(client: httpx.Client, history: History) -> None:
    assert client.get("/healthz").status_code == 200
    version = client.get("/v1/version").json()
    assert version.pop("reached_by").startswith("snapshot 1.10 (")
    assert version == {"replica": "replica-0", "version": "1.10", "weights_id": history.manifests[-1].weights_id}
    metrics = client.get("/metrics").text
    assert "mars_rollout_policy_step 10.0" in metrics
    assert re.search(r"^vllm:generation_tokens_total", metrics, re.MULTILINE)


async def test_a_prompt_in_the_queue_becomes_the_same_group_as_any_time(
    run_folder: RunFolder, replica: ReplicaProcess, redis_url: str
) -> None:
    """The real engine, the real queue: put twice under other keys, the group's members are equal."""
    queue, streams = Queue(redis_url), Streams(run_folder.recipe.run.name)
    groups = []
    for key in ("first", "second"):
        payload = make_prompt(run_folder.blobs).model_dump_json().encode()
        await queue.put(streams.prompts, payload, dedupe_key=key, bound=10)
        claim = None
        while claim is None:
            # The reward service listens too: what it forwards holds the group.
            claim = await queue.claim(streams.scored("train"), "test", wait_s=0.5)
        await queue.complete(claim)
        groups.append(ScoredGroup.model_validate_json(claim.payload).group)
    assert [c.model_dump() for c in groups[0].completions] == [c.model_dump() for c in groups[1].completions]
    assert groups[0].policy_version == PolicyVersion(incarnation=1, step=10)
    await queue.close()
