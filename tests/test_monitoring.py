"""Prometheus' configuration, alert rules and Grafana's dashboard: sound, about metrics that exist, and full of a run's data."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any, cast

import pytest
import uvicorn
import yaml

import generate_dashboard
from builders import scored_with
from dashboard import ALERTS, alert_rules, dashboard_queries, load_dashboard, metrics_of, panels
from mars_reward.app import build_app as reward_app
from mars_reward.metrics import SECONDS
from mars_rollout.metrics import count_group, count_stages
from mars_shared.contracts import PolicyVersion
from mars_shared.http import bind
from mars_shared.records.state import QueueState, RunState, ServiceState
from mars_shared.settings import Deployment
from mars_shared.stack import Ports
from mars_trainer.app import build_app as trainer_app
from mars_trainer.batch import Batch, Judged
from mars_trainer.exposition import begin_counting, count_step
from mars_trainer.progress import Progress
from prometheus_server import PrometheusServer
from tools import promtool_path

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
RULE_TESTS = ROOT / "tests/alert_rules.test.yml"
CONFIGS = (DEPLOY / "prometheus.yml", DEPLOY / "prometheus-local.yml")
KEY = "s3cret"
RUN = "monitored"
ELSEWHERE = {"up": {"job"}, "ALERTS": {"alertstate"}}
"""Prometheus' own metrics, with the labels by which we choose."""
NOT_HERE = {"GPU memory"} | {panel["title"] for panel in panels() if "vllm:" in panel["targets"][0]["expr"]}
"""Panels of what this process has not: a GPU, and an engine unless another test imported one."""


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([promtool_path(), *map(str, arguments)], capture_output=True, text=True)


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def targets_of(config: Path) -> dict[str, list[str]]:
    """Addresses by job; of one that is asked of DNS, its name and port."""
    found = {}
    for job in load(config)["scrape_configs"]:
        named = [f"{name}:{sd['port']}" for sd in job.get("dns_sd_configs", ()) for name in sd["names"]]
        found[job["job_name"]] = named + [target for group in job.get("static_configs", ()) for target in group["targets"]]
    return found


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_promtool_accepts_the_configuration_and_its_rules_are_ours(config: Path) -> None:
    # The key's file is on the machine that scrapes, so promtool shall not look for it.
    result = promtool("check", "config", "--syntax-only", config)
    assert result.returncode == 0, result.stderr
    assert [config.parent / name for name in load(config)["rule_files"]] == [ALERTS]


def test_in_compose_every_service_is_scraped_at_its_port() -> None:
    services = load_compose()["services"]
    ports = {"rollout": 8100, "reward": 8200, "trainer": 8300}
    assert targets_of(DEPLOY / "prometheus.yml") == {name: [f"{name}:{port}"] for name, port in ports.items()}
    for name, port in ports.items():
        assert f"127.0.0.1:{port}/readyz" in services[name]["healthcheck"]["test"][-1]


def load_compose() -> dict[str, Any]:
    return load(ROOT / "docker-compose.yml")


def test_on_one_machine_the_default_ports_are_scraped() -> None:
    ports = Ports()
    assert targets_of(DEPLOY / "prometheus-local.yml") == {
        "rollout": [f"127.0.0.1:{ports.rollout(index)}" for index in (0, 1)],
        "reward": [f"127.0.0.1:{ports.reward}"],
        "trainer": [f"127.0.0.1:{ports.trainer}"],
    }


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_job_sends_the_key(config: Path) -> None:
    jobs = load(config)["scrape_configs"]
    assert all(set(job["authorization"]) == {"credentials_file"} for job in jobs)


def test_promtool_accepts_the_alert_rules() -> None:
    result = promtool("check", "rules", ALERTS)
    assert result.returncode == 0, result.stdout + result.stderr


def test_each_alert_fires_when_it_should_and_none_does_in_a_healthy_run() -> None:
    result = promtool("test", "rules", RULE_TESTS)
    assert result.returncode == 0, result.stdout + result.stderr


def test_there_is_a_case_for_each_alert() -> None:
    fired = set(re.findall(r'ALERTS\{alertname="(\w+)", alertstate="firing"', RULE_TESTS.read_text(encoding="utf-8")))
    assert fired == set(alert_rules())


@pytest.mark.parametrize("name", alert_rules())
def test_an_alert_says_how_bad_it_is_what_it_means_and_what_to_do(name: str) -> None:
    rule = alert_rules()[name]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    path, _, anchor = rule["annotations"]["runbook"].partition("#")
    section = (ROOT / path).read_text(encoding="utf-8").partition(f"## {anchor.capitalize()}\n")[2].partition("\n## ")[0]
    assert re.search(rf"^\| `{name}` \| {rule['labels']['severity']} \|", section, re.M), f"{path} has no row for {name}"


def test_the_documented_alerts_are_those_that_exist() -> None:
    text = (ROOT / "docs/monitoring.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(Mars\w+)` \|", text, re.M)) == set(alert_rules())


def documented_metrics() -> dict[str, set[str]]:
    """Labels of every series that docs/metrics.md promises."""
    found = {}
    text = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    for name, labels, kind in re.findall(r"`(mars_\w+)(?:\{([^}]*)\})?` \| (\S+)", text):
        names = [f"{name}_{part}" for part in ("bucket", "sum", "count")] if kind == "histogram" else [name]
        found |= {each: {label.strip() for label in labels.split(",")} for each in names}
    return found


EXPRESSIONS = [*dashboard_queries(), *((name, rule["expr"]) for name, rule in alert_rules().items())]


def test_alerts_and_panels_read_documented_metrics_by_their_labels() -> None:
    known = documented_metrics() | ELSEWHERE
    for title, expression in EXPRESSIONS:
        used = [(name, labels) for name, labels in metrics_of(expression) if not name.startswith("vllm:")]
        assert used or "vllm:" in expression
        for name, labels in used:
            assert name in known, f"{title}: docs/metrics.md has no {name}"
            assert labels <= known[name], f"{title}: {name} has no label {labels - known[name]}"


def test_metrics_of_the_engine_are_those_that_the_installed_vllm_has() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    source = (Path(spec.origin).parent / "v1/metrics/loggers.py").read_text(encoding="utf-8")
    defined = set(re.findall(r'name="(vllm:\w+)"', source))
    read = {name for _, expression in EXPRESSIONS for name, _ in metrics_of(expression) if name.startswith("vllm:")}
    assert read and {re.sub(r"_(total|bucket)$", "", name) for name in read} <= defined


def test_the_dashboard_is_the_one_that_its_list_makes() -> None:
    written = (DEPLOY / "grafana/dashboards/mars.json").read_text(encoding="utf-8")
    assert written == generate_dashboard.render(), "it is stale; run: .venv/bin/python deploy/generate_dashboard.py"


def test_every_panel_says_what_it_shows_in_which_unit_and_where_from() -> None:
    for panel in panels():
        assert panel["title"] and panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["targets"]
        for target in panel["targets"]:
            assert target["expr"] and target["legendFormat"]
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_panels_have_ids_titles_and_places_of_their_own() -> None:
    dashboard = load_dashboard()
    everything = [*panels(), *(panel for panel in dashboard["panels"] if panel["type"] == "row")]
    assert len({panel["id"] for panel in everything}) == len(everything)
    assert len({panel["title"] for panel in everything}) == len(everything)
    for one, other in combinations([panel["gridPos"] for panel in everything], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in everything)
    assert "id" not in dashboard  # Grafana gives it one


def test_every_variable_that_queries_use_can_be_chosen() -> None:
    names = {variable["name"] for variable in load_dashboard()["templating"]["list"]}
    used = {name for panel in panels() for target in panel["targets"] for name in re.findall(r"\$(\w+)", target["expr"])}
    assert used - {"__rate_interval"} <= names


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The app in a thread, at the address that is given."""
    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    thread = Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def step_metrics() -> dict[str, float]:
    """A value for every documented metric of a step."""
    text = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    names = re.findall(r"^\| `([^`]+)` \| `mars_step_", text, re.M)
    return {name.replace("<part>", "format").replace("<source>", "visible"): 0.25 for name in names} | {"reward": 1.5}


def look() -> RunState:
    streams = ("prompts", "rollouts", "scored:train", "scored:eval", "retries", "dead")
    queues = {stream: QueueState(entries=3, claimed=1, oldest_s=2.5) for stream in streams}
    replicas = [
        ServiceState(
            service="rollout", name=f"rollout-{index}", seen_s=seen_s, started=0, starts=1, in_hand=2, version="1.6", lag=1
        )
        for index, seen_s in enumerate((1.5, 45.0))
    ]
    worker = ServiceState(service="reward", name="reward-0", seen_s=0.5, started=0, starts=1, in_hand=0)
    return RunState(state="training", step=7, steps=9, version="1.7", redis=True, queues=queues, services=(*replicas, worker))


@pytest.fixture(scope="module")
def watching(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrometheusServer]:
    """It has read a trainer before and after a step; what replicas and reward workers count, this process tells as well."""
    deployment = Deployment.model_validate({"api_key": KEY})
    evaluation = {"datasets": {"digits": {"multi": 0.5, "union": 0.75, "mono": {"visible": 0.25}}}}
    progress = Progress(
        RUN, 9, PolicyVersion(incarnation=1, step=6), "training", metrics=step_metrics(), evaluations=[evaluation]
    )
    begin_counting(RUN)
    with served(trainer_app(deployment, progress, None, look)) as address:
        with PrometheusServer(tmp_path_factory.mktemp("prometheus"), {"trainer": [address]}, KEY) as server:
            server.wait_until_scraped(1)
            take_a_step(progress)
            server.wait_until_scraped(3)
            yield server


def take_a_step(progress: Progress) -> None:
    """One group goes through all services."""
    scored = scored_with((1, 0), {"visible": (1,), "infrared": (0,)})
    count_group(scored.group)
    count_stages({"fetch": 0.5})
    SECONDS.labels(via="queue").observe(0.01)
    judged = Judged(cast(Any, SimpleNamespace(scored=scored)), cast(Any, None))
    count_step(RUN, 6, Batch(wanted=1, kept=(judged,), dropped=()), {"training": 1.5, "waiting": 0.5}, 11.0)
    progress.version = PolicyVersion(incarnation=1, step=7)


def numbers(server: PrometheusServer, expression: str) -> list[float]:
    return sorted(float(sample["value"][1]) for sample in server.query(expression))


def test_a_real_prometheus_takes_the_rules(watching: PrometheusServer) -> None:
    assert set(watching.alerts()) == set(alert_rules())


def test_every_panel_has_data(watching: PrometheusServer) -> None:
    empty = {title for title, expression in dashboard_queries(RUN) if not watching.query(expression)}
    assert "GPU memory" in empty and empty <= NOT_HERE


def test_panels_show_what_the_run_did(watching: PrometheusServer) -> None:
    shown: dict[str, list[float]] = {}
    for title, expression in dashboard_queries(RUN):
        shown[title] = shown.get(title, []) + numbers(watching, expression)
    assert shown["Steps"] == [7, 9]
    assert shown["Reward"] == [1.5, 0.25]
    assert shown["Replicas"] == [1]  # the other one has been silent for 45 s
    assert shown["Evaluation"] == [0.25, 0.5, 0.75]
    # Of the one step, 1.5 s trained and 0.5 s waited; three other stages took none of it.
    assert shown["Share of the time"] == pytest.approx([0, 0, 0, 0.25, 0.75])
    # How far Prometheus extrapolates seconds and steps differs at a series' beginning, and is the same for all stages.
    *nothing, waiting, training = shown["Seconds of a step"]
    assert nothing == [0, 0, 0] and training / waiting == pytest.approx(3)
    assert shown["Restarts"] == [0, 0, 0, 0]


@pytest.mark.parametrize(("key", "health"), [("", "up"), (KEY, "up"), ("another", "down")])
def test_the_key_decides_whether_metrics_are_read(key: str, health: str, tmp_path: Path) -> None:
    # Without a key the services ask for none, and an empty one does not disturb them.
    deployment = Deployment.model_validate({"api_key": KEY} if key else {})
    with served(reward_app(deployment, recipe="paper", ready=lambda: None)) as address:
        with PrometheusServer(tmp_path, {"reward": [address]}, key) as server:
            server.wait_until_known()
            assert server.targets() == {"reward": [health]}
