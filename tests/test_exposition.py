"""What the trainer tells Prometheus, from a progress and a look that are made by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from builders import make_completion, make_group, make_prompt, make_score, make_scored, sampling
from mars_shared.contracts import Kind, PolicyVersion, ScoredGroup, VersionSpan
from mars_shared.gpu import GpuMemory
from mars_shared.records.state import QueueState, RunState, ServiceState
from mars_shared.settings import Deployment
from mars_trainer.app import build_app
from mars_trainer.batch import Batch, Judged
from mars_trainer.exposition import begin_counting, completion_lags, count_step
from mars_trainer.progress import Progress

QUEUES = {"prompts": QueueState(entries=3, claimed=1, oldest_s=2.5)}
REPLICA = ServiceState(service="rollout", name="replica-0", seen_s=1.5, started=0, starts=3, in_hand=2, version="1.4", lag=3)
WORKER = ServiceState(service="reward", name="reward-0", seen_s=0.5, started=0, starts=1, in_hand=0)
LOOK = RunState(state="training", step=7, steps=9, version="1.7", redis=True, queues=QUEUES, services=(REPLICA, WORKER))
EVALUATION = {"datasets": {"digits": {"multi": 0.5, "union": 0.75, "mono": {"visible": 0.25}}}}


def scrape(progress: Progress, look: RunState | None = None) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    app = build_app(Deployment(), progress, None, lambda: look)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        text = client.get("/metrics").text
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families), "a family stands in one place"
    return {(one.name, frozenset(one.labels.items())): one.value for family in families for one in family.samples}


def run_progress(**fields: Any) -> Progress:
    return Progress(run="demo", steps=9, version=PolicyVersion(incarnation=2, step=7), **fields)


def value(samples: dict[Any, float], name: str, /, **labels: str) -> float | None:
    return samples.get((name, frozenset({"run": "demo", **labels}.items())))


def test_the_last_step_is_told_by_metric_part_and_source() -> None:
    metrics = {"reward": 1.5, "reward/format": 0.5, "gain": -0.25, "gain/visible": 0.125, "clip_ratio/low": 0.01}
    samples = scrape(run_progress(metrics=metrics, state="training", last_step_at=123.0))
    assert value(samples, "mars_step_reward") == 1.5
    assert value(samples, "mars_step_reward_part", part="format") == 0.5
    assert value(samples, "mars_step_gain") == -0.25
    assert value(samples, "mars_step_gain_by_source", source="visible") == 0.125
    assert value(samples, "mars_step_clip_ratio_low") == 0.01
    assert value(samples, "mars_train_step") == 7 and value(samples, "mars_train_planned_steps") == 9
    assert value(samples, "mars_train_incarnation") == 2 and value(samples, "mars_train_state", state="training") == 1
    assert value(samples, "mars_train_last_step_timestamp_seconds") == 123


def test_what_a_step_lacks_is_absent_instead_of_old() -> None:
    progress = run_progress(metrics={"loss": 1.0})
    assert value(scrape(progress), "mars_step_loss") == 1
    progress.metrics = {}
    assert value(scrape(progress), "mars_step_loss") is None


def test_the_last_evaluation_is_told_by_dataset_and_view() -> None:
    samples = scrape(run_progress(evaluations=[{"datasets": {}}, EVALUATION]))
    found = {view: value(samples, "mars_eval_score", dataset="digits", view=view) for view in ("multi", "union", "mono/visible")}
    assert found == {"multi": 0.5, "union": 0.75, "mono/visible": 0.25}


def test_queues_and_services_are_told_from_the_newest_look() -> None:
    samples = scrape(run_progress(), LOOK)
    assert value(samples, "mars_queue_up") == 1
    assert value(samples, "mars_queue_entries", stream="prompts") == 3
    assert value(samples, "mars_queue_claimed", stream="prompts") == 1
    assert value(samples, "mars_queue_oldest_seconds", stream="prompts") == 2.5
    replica, worker = {"service": "rollout", "name": "replica-0"}, {"service": "reward", "name": "reward-0"}
    assert value(samples, "mars_service_restarts_total", **replica) == 2
    assert value(samples, "mars_service_restarts_total", **worker) == 0
    assert value(samples, "mars_service_groups_in_hand", **replica) == 2
    assert value(samples, "mars_service_silence_seconds", **worker) == 0.5
    assert value(samples, "mars_replica_lag_steps", name="replica-0") == 3
    assert value(samples, "mars_replica_lag_steps", name="reward-0") is None


def test_a_redis_that_does_not_answer_leaves_no_old_queues() -> None:
    samples = scrape(run_progress(), LOOK.model_copy(update={"redis": False, "queues": {}, "services": ()}))
    assert value(samples, "mars_queue_up") == 0
    assert value(samples, "mars_queue_entries", stream="prompts") is None


def sampled_by(*steps: tuple[int, ...]) -> ScoredGroup:
    """A group with a multi-source completion for each of `steps`: the policies that sampled its tokens, one a token."""
    prompt = make_prompt(spec=sampling(num_generations=len(steps), num_mono=1))
    members = list(make_group(prompt).completions)
    for index, versions in enumerate(steps):
        made = make_completion(prompt.task_id, Kind.MULTI, None, index, tokens=len(versions))
        spans = tuple(
            VersionSpan(version=PolicyVersion(incarnation=1, step=step), start=at, end=at + 1) for at, step in enumerate(versions)
        )
        members[index] = made.model_copy(update={"spans": spans})
    group = make_group(prompt).model_copy(update={"completions": tuple(members)})
    return make_scored(group, [make_score(1.0) for _ in members])


def test_a_completion_is_as_stale_as_its_oldest_token() -> None:
    # At step 7: tokens by 7 and 7 are of now; by 5 and 7, two steps behind; by 4, three.
    assert completion_lags(sampled_by((7, 7), (5, 7), (4,)), 7) == [0, 2, 3]


def test_counters_begin_at_zero_and_grow_with_each_step() -> None:
    def sample(name: str, **labels: str) -> float | None:
        return REGISTRY.get_sample_value(name, {"run": "counted", **labels})

    assert sample("mars_train_tokens_total") is None
    begin_counting("counted")
    assert sample("mars_train_tokens_total") == 0 and sample("mars_train_groups_total", outcome="dead") == 0
    judged = Judged(cast(Any, SimpleNamespace(scored=sampled_by((7,), (5,)))), cast(Any, None))
    batch = Batch(wanted=2, kept=(judged,), dropped=(judged, judged))
    count_step("counted", 7, batch, {"training": 1.5, "waiting": 0.25}, 11.0)
    count_step("counted", 7, batch, {"training": 0.5}, 1.0)
    assert sample("mars_train_tokens_total") == 12
    assert (
        sample("mars_train_groups_total", outcome="trained") == 2 and sample("mars_train_groups_total", outcome="left_out") == 4
    )
    assert sample("mars_train_stage_seconds_total", stage="training") == 2
    # Lags 0 and 2, twice each.
    assert [sample("mars_train_staleness_steps_bucket", le=le) for le in ("0.0", "1.0", "2.0")] == [2, 2, 4]


class FakeNvml:
    """Two GPUs as NVIDIA's library tells of them."""

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{'ab'[handle]}-0"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(used=10 + handle, total=100)


@pytest.mark.parametrize(
    ("visible", "seen"), [(None, ["GPU-a-0", "GPU-b-0"]), ("1", ["GPU-b-0"]), ("GPU-a", ["GPU-a-0"]), ("", [])]
)
def test_the_memory_of_the_gpus_that_a_process_may_use_is_told(visible: str | None, seen: list[str]) -> None:
    used, total = GpuMemory(FakeNvml(), visible).collect()
    assert [sample.labels["gpu"] for sample in used.samples] == seen
    if seen == ["GPU-a-0", "GPU-b-0"]:
        assert [sample.value for sample in used.samples] == [10, 11] and [s.value for s in total.samples] == [100, 100]


def test_a_machine_without_gpus_tells_of_none() -> None:
    assert list(GpuMemory(None, None).collect()) == []
