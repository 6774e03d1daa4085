"""The page's HTTP face over a real run folder: lists, filters, neighbours, images, and who may ask."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr

from builders import image_bytes, make_group, make_prompt, make_score, make_scored, sampling
from mars_shared.blobs import BlobStore
from mars_shared.contracts import Kind, Purpose, ScoredGroup, Source
from mars_shared.errors import ConfigError
from mars_shared.settings import Deployment
from mars_shared.telemetry import EventLog
from mars_shared.ui.app import STATIC, build_app
from mars_shared.ui.curves import StepTable
from mars_trainer.algorithm.advantages import mars_advantages
from mars_trainer.batch import Batch, Judged
from mars_trainer.credit import Credit
from mars_trainer.group_log import GroupLog

SOURCES = ("visible", "infrared")
REWARDS = {
    # multi, multi, visible, infrared -> gain
    0: (1.0, 1.0, 0.0, 0.0),  # +1: promotion
    1: (0.0, 0.0, 1.0, 0.0),  # -0.5: conflict, losing to visible
    2: (0.5, 0.5, 0.5, 0.5),  # 0: no signal
    3: (0.0, 0.0, 0.0, 1.0),  # -0.5: conflict, losing to infrared
}
IMAGE = image_bytes((28, 28))


def scored(blobs: BlobStore, index: int, rewards: tuple[float, ...], **prompt: Any) -> ScoredGroup:
    made = make_prompt(index, sources=SOURCES, spec=sampling(len(rewards) - 2, 1, greedy=len(rewards) == 3), **prompt)
    sources = tuple(Source(name=name, blob=blobs.put(IMAGE), media_type="image/png") for name in SOURCES)
    group = make_group(made.model_copy(update={"sources": sources}))
    return make_scored(group, [make_score(reward) for reward in rewards])


def judged(group: ScoredGroup) -> Judged:
    found = mars_advantages(group.rewards(Kind.MULTI), {name: group.rewards(Kind.MONO, name) for name in SOURCES})
    credit = Credit(found, (True, True), (0.0, 0.0), signal=found.pool_std > 0)
    return Judged(cast(Any, SimpleNamespace(scored=group)), credit)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Two steps with two groups each, and an evaluation of one group."""
    blobs, log, events = BlobStore(tmp_path / "blobs"), GroupLog(tmp_path / "groups"), EventLog(tmp_path / "events.jsonl")
    log.evaluation(0, [scored(blobs, 9, (1.0, 0.0, 0.0), purpose=Purpose.EVAL)])
    for step, indices in ((1, (0, 1)), (2, (2, 3))):
        groups = [judged(scored(blobs, index, REWARDS[index])) for index in indices]
        kept = tuple(group for group in groups if group.credit.signal)
        log.step(step, Batch(2, kept, tuple(group for group in groups if not group.credit.signal)))
        events.write("step", step=step, steps=2, metrics={"reward": float(step)}, seconds={"training": 1.0})
    return tmp_path


def client(run_dir: Path, key: str | None = None) -> TestClient:
    deployment = Deployment(api_key=None if key is None else SecretStr(key))
    return TestClient(build_app(run_dir, deployment), base_url="http://127.0.0.1")


@pytest.fixture
def page(run_dir: Path) -> Iterator[httpx.Client]:
    with client(run_dir) as found:
        yield found


def names(page: httpx.Client, **wanted: Any) -> list[str]:
    return [group["name"] for group in page.get("/v1/groups", params=wanted).json()["groups"]]


def test_groups_are_listed_newest_first_a_page_at_a_time(page: httpx.Client) -> None:
    whole = ["train-00000003", "train-00000002", "train-00000001", "train-00000000"]
    assert names(page, occasion="step") == whole
    assert names(page, occasion="step", offset=1, limit=2) == whole[1:3]
    answer = page.get("/v1/groups").json()
    assert (answer["recorded"], answer["total"]) == (5, 5)
    assert answer["choices"]["sources"] == ["infrared", "visible"]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({"outcome": "conflict"}, [3, 1]),
        ({"outcome": "promotion", "occasion": "step"}, [0]),
        ({"outcome": "no_signal"}, [2]),
        ({"losing_to": "visible"}, [1]),
        ({"losing_to": "infrared"}, [3]),
        ({"source": "depth"}, []),
        ({"min_reward": 0.5, "occasion": "step"}, [2, 0]),
        ({"min_reward": 0.5, "max_reward": 0.75}, [2]),
        ({"min_step": 2}, [3, 2]),
        ({"max_step": 1, "occasion": "step"}, [1, 0]),
        ({"dataset": "nothing"}, []),
    ],
)
def test_filters_find_exactly_what_they_say(page: httpx.Client, wanted: dict[str, Any], found: list[int]) -> None:
    assert names(page, **wanted) == [f"train-{index:08d}" for index in found]


def test_a_filter_that_nobody_knows_is_refused(page: httpx.Client) -> None:
    for wanted in ({"outcome": "draw"}, {"min_reward": "nan"}, {"limit": 0}, {"colour": "red"}):
        assert page.get("/v1/groups", params=wanted).status_code == 422, wanted


def test_a_group_knows_its_neighbours_among_the_filtered_ones(page: httpx.Client) -> None:
    answer = page.get("/v1/group", params={"name": "train-00000003", "outcome": "conflict"}).json()
    assert (answer["place"], answer["total"], answer["previous"], answer["next"]) == (0, 2, None, "train-00000001")
    answer = page.get("/v1/group", params={"name": "train-00000001", "outcome": "conflict"}).json()
    assert (answer["previous"], answer["next"]) == ("train-00000003", None)
    answer = page.get("/v1/group", params={"name": "train-00000000", "outcome": "conflict"}).json()
    assert (answer["place"], answer["previous"], answer["next"]) == (None, None, None)
    assert [each["reward"] for each in answer["group"]["answers"]] == [1.0, 1.0, 0.0, 0.0]


def test_images_are_those_of_the_group_with_their_type(page: httpx.Client) -> None:
    answer = page.get("/v1/image", params={"group": "train-00000000", "source": "infrared"})
    assert (answer.content, answer.headers["content-type"]) == (IMAGE, "image/png")


@pytest.mark.parametrize(
    ("route", "parameters", "message"),
    [
        ("/v1/group", {"name": "train-99"}, "no group 'train-99' is recorded"),
        ("/v1/image", {"group": "train-99", "source": "visible"}, "no group 'train-99' is recorded"),
        ("/v1/image", {"group": "train-00000000", "source": "../blobs"}, "expected one of visible, infrared"),
    ],
)
def test_what_is_not_there_is_404_and_says_what_is(
    page: httpx.Client, route: str, parameters: dict[str, str], message: str
) -> None:
    answer = page.get(route, params=parameters)
    assert answer.status_code == 404 and message in answer.json()["error"]["message"]


def test_groups_that_are_written_meanwhile_appear(page: httpx.Client, run_dir: Path) -> None:
    assert len(names(page)) == 5
    GroupLog(run_dir / "groups").step(3, Batch(1, (judged(scored(BlobStore(run_dir / "blobs"), 4, REWARDS[0])),), ()))
    assert names(page)[0] == "train-00000004"


def test_records_that_cannot_be_read_hide_no_others_and_are_counted(page: httpx.Client, run_dir: Path) -> None:
    assert page.get("/v1/groups").json()["unreadable"] == 0
    segment = run_dir / "groups/000001.jsonl"
    evaluation, *steps = segment.read_bytes().splitlines(keepends=True)
    empty = json.dumps(json.loads(steps[0]) | {"answers": []}).encode() + b"\n"
    segment.write_bytes(b"".join([evaluation, *steps, steps[0][:200] + b"\n", empty, b'{"later": 1}\n', steps[0][:50]]))
    with client(run_dir) as fresh:
        for server in (page, fresh):
            answer = server.get("/v1/groups").json()
            assert (answer["recorded"], answer["unreadable"], len(answer["groups"])) == (5, 3, 5)
            assert server.get("/v1/group", params={"name": "train-00000003"}).status_code == 200
            assert server.get("/v1/curves").json()["steps"] == [1, 2]


def test_curves_follow_the_events(page: httpx.Client, run_dir: Path) -> None:
    assert page.get("/v1/curves").json() == {
        "steps": [1, 2],
        "metrics": {"reward": [1.0, 2.0]},
        "seconds": {"training": [1.0, 1.0]},
    }
    EventLog(run_dir / "events.jsonl").write("step", step=3, steps=3, metrics={"gain": 0.5}, seconds={})
    answer = page.get("/v1/curves").json()
    assert answer["metrics"] == {"reward": [1.0, 2.0, None], "gain": [None, None, 0.5]}


def test_long_curves_are_thinned_to_means() -> None:
    table = StepTable()
    for step in range(1, 8):
        table.add({"step": step, "metrics": {"reward": float(step)} | ({"kl": 0.5} if step == 5 else {}), "seconds": {}})
    # Bins of ceil(7 / 3) = 3 steps: 1 2 3, 4 5 6, 7.
    curves = table.curves(points=3)
    assert (curves.steps, curves.metrics["reward"]) == ([3, 6, 7], [2.0, 5.0, 7.0])
    assert curves.metrics["kl"] == [None, 0.5, None]


def test_a_step_that_a_restart_repeats_ends_what_was_known_from_there_on() -> None:
    table = StepTable()
    for step, reward in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 20.0)):
        table.add({"step": step, "metrics": {"reward": reward}, "seconds": {"training": reward}})
    curves = table.curves()
    assert (curves.steps, curves.metrics["reward"], curves.seconds["training"]) == ([1, 2], [1.0, 20.0], [1.0, 20.0])


def test_the_status_tells_of_replicas_queues_and_deaths_and_whether_the_trainer_lives(run_dir: Path, page: httpx.Client) -> None:
    status = page.get("/v1/status").json()
    assert (status["state"], status["steps_recorded"], status["deaths"], status["finished"]) == (None, 2, [], False)
    events, replica = EventLog(run_dir / "events.jsonl"), {"service": "rollout", "name": "r", "seen_s": 1, "started": 0}
    state = {"state": "training", "step": 2, "steps": 9, "version": "1.2", "redis": True}
    events.write("dead", task_id="train-00000007", prompt_id="p/7", reason="<script>alert(1)</script>")
    for incarnation in (1, 2, 3):
        events.write("started", incarnation=incarnation)
    events.write("resumed", step=2, incarnation=3)
    events.write("state", **state, queues={}, services=[replica | {"starts": 2, "in_hand": 3, "version": "1.1", "lag": 1}])
    status = page.get("/v1/status").json()
    assert (status["alive"], status["restarts"], status["deaths"][0]["task_id"]) == (True, 2, "train-00000007")
    assert (status["state"]["services"][0]["lag"], status["state"]["step"]) == (1, 2)
    events.write("finished", step=9, weights="ab")
    status = page.get("/v1/status").json()
    assert (status["alive"], status["finished"]) == (False, True)


def test_a_stopped_run_is_not_alive_until_it_is_started_again(run_dir: Path, page: httpx.Client) -> None:
    events = EventLog(run_dir / "events.jsonl")
    events.write("stopped", step=2)
    status = page.get("/v1/status").json()
    assert (status["alive"], status["finished"], status["stopped"]) == (False, False, True)
    events.write("started", incarnation=2)
    status = page.get("/v1/status").json()
    assert (status["alive"], status["stopped"]) == (True, False)


def test_a_run_that_died_is_said_to_be_silent(run_dir: Path, page: httpx.Client) -> None:
    line = {
        "time": time.time() - 120,
        "event": "state",
        "state": "training",
        "step": 2,
        "steps": 9,
        "version": "1.2",
        "redis": True,
    }
    (run_dir / "events.jsonl").write_text(json.dumps(line) + "\n{torn")
    status = page.get("/v1/status").json()
    assert (status["alive"], status["finished"]) == (False, False) and 120 <= status["said_s"] < 1000


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ({"version": None}, "version: Input should be a valid string"),
        ({"services": [{"service": "rollout", "name": "r"}]}, "services.0.seen_s: Field required"),
        ({"queues": {"dead": {"entries": 0, "claimed": 0, "oldest_s": 0, "bytes": 7}}}, "queues.dead.bytes: is no field"),
    ],
)
def test_a_state_of_another_version_is_left_out_and_the_reason_said(
    run_dir: Path, page: httpx.Client, damage: dict[str, Any], problem: str
) -> None:
    events = EventLog(run_dir / "events.jsonl")
    state = {"state": "training", "step": 2, "steps": 9, "version": "1.2", "redis": True, "a_field_of_later": 1}
    events.write("state", **state)
    assert page.get("/v1/status").json()["state"]["step"] == 2
    events.write("state", **(state | damage))
    answer = page.get("/v1/status")
    assert answer.status_code == 200 and answer.json()["state"] is None and answer.json()["alive"]
    said = answer.json()["state_problem"]
    assert said.startswith("the newest state event is not of this version of mars: ") and problem in said
    events.write("state", **state)
    assert (page.get("/v1/status").json()["state"]["step"], page.get("/v1/status").json()["state_problem"]) == (2, None)


def test_the_age_of_a_state_counts_from_when_it_was_written_down(run_dir: Path, page: httpx.Client) -> None:
    assert page.get("/v1/status").json()["state_s"] is None
    old = {"event": "state", "state": "training", "step": 2, "steps": 9, "version": "1.2", "redis": True}
    with (run_dir / "events.jsonl").open("a") as file:
        for line in ({"time": time.time() - 500} | old, {"time": time.time() - 100, "event": "checkpoint", "step": 2}):
            file.write(json.dumps(line) + "\n")
    status = page.get("/v1/status").json()
    assert 500 <= status["state_s"] < 1500 and 100 <= status["said_s"] < 500


def test_without_the_key_a_browser_gets_the_entrance_and_nothing_of_the_run(run_dir: Path) -> None:
    with client(run_dir, "secret") as page:
        assert page.get("/").status_code == 200
        assert {page.get(f"/static/{path.name}").status_code for path in STATIC.iterdir()} == {200}
        for route in (
            "/v1/groups",
            "/v1/curves",
            "/v1/evaluations",
            "/v1/status",
            "/v1/group?name=a",
            "/v1/image",
            "/metrics",
            "/docs",
        ):
            assert page.get(route).status_code == 401, route
        assert page.post("/key", json={"key": "wrong"}).status_code == 403 and not page.cookies
        answer = page.post("/key", json={"key": "secret"})
        assert answer.status_code == 204
        assert {"HttpOnly", "SameSite=strict"} <= set(answer.headers["set-cookie"].split("; "))
        assert page.get("/v1/groups").status_code == 200


def test_any_key_that_a_header_carries_opens_the_page_by_its_cookie(run_dir: Path) -> None:
    key = "".join(map(chr, range(33, 127))) + " ~"
    with client(run_dir, key) as page:
        assert page.post("/key", json={"key": "schlüssel"}).status_code == 403
        assert page.post("/key", json={"key": key}).status_code == 204
        assert page.get("/v1/groups").status_code == 200


def test_every_answer_forbids_what_the_page_does_not_need(run_dir: Path) -> None:
    with client(run_dir, "secret") as page:
        for route in ("/", "/v1/groups", "/static/page.js", "/nothing"):
            headers = page.get(route).headers
            assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'"), route
            assert headers["x-content-type-options"] == "nosniff"


def test_beyond_this_machine_the_page_needs_a_key(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match="MARS_API_KEY"):
        build_app(run_dir, Deployment(host="0.0.0.0"))
