"""What all services of a real run tell Prometheus is exactly what docs/metrics.md says."""

from __future__ import annotations

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from live_run import ROOT, STEPS, URLS, LiveRun

pytestmark = pytest.mark.engine

GPU = {"mars_gpu_memory_used_bytes", "mars_gpu_memory_total_bytes"}
PARTS_OF_A_HISTOGRAM = re.compile(r"_(bucket|sum|count)$")


def documented() -> dict[str, str]:
    """Kind of metric by its name, of every row of every table; those of a step are gauges."""
    text = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    found = dict(re.findall(r"^\| `(mars_\w+)(?:\{[^`]*\})?` \| (gauge|counter|histogram) \|", text, re.M))
    return found | dict.fromkeys(re.findall(r"^\| `[^`]+` \| `(mars_step_\w+)\{", text, re.M), "gauge")


def told(run: LiveRun) -> dict[str, str]:
    """Kind by name, of every series that has a value in a scrape of any service."""
    found = {}
    for service in URLS:
        for family in text_string_to_metric_families(run.scrape(service)):
            for sample in family.samples:
                name = PARTS_OF_A_HISTOGRAM.sub("", sample.name) if family.type == "histogram" else sample.name
                found[name] = family.type
    return {name: kind for name, kind in found.items() if name.startswith("mars_")}


def has_gpu(run: LiveRun) -> bool:
    return "mars_gpu_memory_total_bytes{" in run.scrape("trainer")


def test_a_full_run_tells_every_documented_metric_and_no_other(live_run: LiveRun) -> None:
    live_run.until_finished()
    expected = documented()
    if not has_gpu(live_run):
        expected = {name: kind for name, kind in expected.items() if name not in GPU}
    assert told(live_run) == expected


def test_replicas_tell_vllms_own_metrics_beside_ours(live_run: LiveRun) -> None:
    live_run.until_finished()
    assert "vllm:num_requests_running" in live_run.scrape("rollout")


def test_the_trainers_numbers_are_those_of_the_event_log(live_run: LiveRun) -> None:
    live_run.until_finished()
    # The trainer looks at its queues every two seconds.
    live_run.wait("a look after the last step", lambda: 'stream="prompts"} 0.0' in live_run.scrape("trainer"))
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(live_run.scrape("trainer"))
        for sample in family.samples
    }
    run, last = ("run", "live"), live_run.events("step")[-1]
    assert samples["mars_train_step", run] == STEPS == last["step"]
    assert samples["mars_step_reward", run] == pytest.approx(last["metrics"]["reward"])
    assert samples["mars_step_gain_by_source", run, ("source", "visible")] == pytest.approx(last["metrics"]["gain/visible"])
    trained = sum(event["metrics"]["groups/trained"] for event in live_run.events("step"))
    assert samples["mars_train_groups_total", ("outcome", "trained"), run] == trained
    assert samples["mars_replica_lag_steps", ("name", "rollout-0"), run] == 0
    stages = sum(sum(event["seconds"].values()) for event in live_run.events("step"))
    told_s = [value for key, value in samples.items() if key[0] == "mars_train_stage_seconds_total"]
    assert sum(told_s) == pytest.approx(stages)
