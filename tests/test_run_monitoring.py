"""A real Prometheus scrapes a real run: every query of the dashboard has an answer, every alert is loaded."""

from __future__ import annotations

import pytest

from dashboard import alert_rules, dashboard_queries
from live_run import LiveRun

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def watched(live_run: LiveRun) -> LiveRun:
    live_run.until_finished()
    live_run.prometheus.wait_until_scraped(times=4)
    return live_run


def test_every_service_is_scraped_with_the_key(watched: LiveRun) -> None:
    assert watched.prometheus.targets() == {"rollout": ["up"], "reward": ["up"], "trainer": ["up"]}


def test_every_query_of_the_dashboard_has_an_answer_when_the_last_step_ends(watched: LiveRun) -> None:
    ended = watched.events("step")[-1]["time"]
    has_gpu = "mars_gpu_memory_total_bytes{" in watched.scrape("trainer")
    queries = [
        (title, query) for title, query in dashboard_queries(run="live", window="1m") if has_gpu or "mars_gpu_" not in query
    ]
    assert len(queries) > 20
    silent = [f"{title}: {query}" for title, query in queries if not watched.prometheus.query(query, at=ended)]
    assert silent == []


def test_every_alert_is_loaded_and_can_be_evaluated(watched: LiveRun) -> None:
    assert sorted(watched.prometheus.alerts()) == sorted(alert_rules())
    for rule in alert_rules().values():
        watched.prometheus.query(rule["expr"])


def test_a_healthy_run_fires_no_alert_about_services(watched: LiveRun) -> None:
    firing = {sample["metric"]["alertname"] for sample in watched.prometheus.query('ALERTS{alertstate="firing"}')}
    assert firing == set()
