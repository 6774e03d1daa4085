"""docker-compose.yml and its CPU override keep what docs/docker.md promises."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from rollout_fixtures import free_port

ROOT = Path(__file__).resolve().parent.parent
BASE, CPU = ROOT / "docker-compose.yml", ROOT / "compose.cpu.yml"
DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
FORMS = {"gpu": [BASE], "cpu": [BASE, CPU]}
OURS = ["reward", "rollout", "trainer", "ui"]
AT_REDIS = ["reward", "rollout", "trainer"]
MONITORING = {"prometheus", "grafana"}
SERVICES = {"redis", *OURS, *MONITORING}
SECRETS = {"MARS_API_KEY": "a-key", "MARS_REDIS_PASSWORD": "a-password"}
RESET = object()


class _Loader(yaml.SafeLoader):
    """SafeLoader that knows compose's tag !reset, which removes what the files before said."""


_Loader.add_constructor("!reset", lambda loader, node: RESET)


def _load(path: Path) -> dict[str, Any]:
    return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)


def _merge(base: Any, override: Any) -> Any:
    """Compose's rule for mappings, the only kind that our override has."""
    if not isinstance(base, dict) or not isinstance(override, dict):
        return override
    merged = {key: _merge(base.get(key), value) for key, value in override.items()}
    return {key: value for key, value in (base | merged).items() if value is not RESET}


def _services(form: str) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for path in FORMS[form]:
        merged = _merge(merged, _load(path))
    return merged["services"]


def _gpus(service: dict[str, Any]) -> list[Any]:
    reservations = service.get("deploy", {}).get("resources", {}).get("reservations", {})
    return [device for device in reservations.get("devices", []) if "gpu" in device["capabilities"]]


@cache
def _without_compose() -> str | None:
    """Why `docker compose` cannot be run here; None if it can."""
    if shutil.which("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        return None
    return (
        "`docker compose` is not here; install the plugin, version 2.24 or newer: docker-compose in Debian 13, "
        "docker-compose-plugin from Docker (no engine is needed)"
    )


def _config(
    form: str, *options: str, secrets: dict[str, str] = SECRETS, profile: str = "monitoring"
) -> subprocess.CompletedProcess[str]:
    if reason := _without_compose():
        pytest.skip(reason)
    files = [argument for path in FORMS[form] for argument in ("-f", str(path))]
    # No .env of this machine may stand in for what the test leaves out.
    command = ["docker", "compose", "--env-file", os.devnull, "--profile", profile, *files, "config", *options]
    others = {name: value for name, value in os.environ.items() if not name.startswith(("MARS_", "COMPOSE_"))}
    return subprocess.run(command, capture_output=True, text=True, env=others | secrets)


def test_there_are_redis_our_services_and_the_monitoring_in_both_forms() -> None:
    assert set(_services("gpu")) == set(_services("cpu")) == SERVICES


def test_prometheus_and_grafana_are_there_if_asked_for_alone() -> None:
    assert {name for name, service in _services("gpu").items() if service.get("profiles") == ["monitoring"]} == MONITORING
    result = _config("gpu", "--services", profile="none")
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.split()) == SERVICES - MONITORING


def test_rollout_and_trainer_reserve_one_gpu_each_by_default_and_nothing_else_does() -> None:
    reserved = {name: len(_gpus(service)) for name, service in _services("gpu").items()}
    assert reserved == dict.fromkeys(SERVICES, 0) | {"rollout": 1, "trainer": 1}


def test_the_cpu_override_leaves_no_gpu_and_builds_the_cpu_stack() -> None:
    services = _services("cpu")
    assert not any(_gpus(service) for service in services.values())
    for name in ("rollout", "trainer"):
        assert services[name]["build"]["args"] == {"STACK": "cpu"}
        assert services[name]["image"] != _services("gpu")[name]["image"]


@pytest.mark.parametrize("form", FORMS)
def test_redis_is_reached_from_inside_only_asks_for_a_password_and_refuses_rather_than_evicts(form: str) -> None:
    redis = _services(form)["redis"]
    assert "ports" not in redis and redis.get("network_mode") != "host"
    configuration = redis["command"][-1].splitlines()
    assert {"requirepass $$REDISCLI_AUTH", "appendonly yes", "maxmemory-policy noeviction"} <= set(configuration)
    assert redis["environment"]["REDISCLI_AUTH"].startswith("${MARS_REDIS_PASSWORD:?")


@pytest.mark.parametrize("form", FORMS)
def test_replicas_scale_because_nothing_of_theirs_is_unique(form: str) -> None:
    rollout = _services(form)["rollout"]
    assert "container_name" not in rollout and "hostname" not in rollout
    [published] = rollout["ports"]
    first, last = re.fullmatch(r".*:(\d+)-(\d+):8100", published).groups()
    assert int(last) - int(first) >= 7
    assert '--name "rollout-$$HOSTNAME"' in rollout["entrypoint"][-1]


@pytest.mark.parametrize("form", FORMS)
def test_published_ports_stay_on_this_host_unless_asked_otherwise(form: str) -> None:
    services = _services(form)
    # Prometheus asks for no key, so that nobody shall be able to ask otherwise.
    assert services.pop("prometheus")["ports"] == ["127.0.0.1:9090:9090"]
    for name, service in services.items():
        for port in service.get("ports", []):
            assert port.startswith("${MARS_BIND:-127.0.0.1}:"), name


@pytest.mark.parametrize("name", [*OURS, "prometheus"])
def test_every_service_requires_the_key(name: str) -> None:
    assert _services("gpu")[name]["environment"]["MARS_API_KEY"].startswith("${MARS_API_KEY:?")


@pytest.mark.parametrize("password", ["", "a-third-secret"])
def test_grafana_has_a_password_of_its_own_and_does_not_start_without(tmp_path: Path, password: str) -> None:
    grafana = _services("gpu")["grafana"]
    assert grafana["environment"]["GF_SECURITY_ADMIN_PASSWORD"] == "${MARS_GRAFANA_PASSWORD:-}"
    assert "MARS_API_KEY" not in json.dumps(grafana)
    shell, option, script = grafana["entrypoint"]
    start = tmp_path / "run.sh"
    start.write_text("#!/bin/sh\necho it starts\n")
    start.chmod(0o755)
    script = script.replace("$$", "$").replace("/run.sh", str(start))
    done = subprocess.run([shell, option, script], capture_output=True, text=True, env={"GF_SECURITY_ADMIN_PASSWORD": password})
    assert (done.returncode == 0, done.stdout) == (bool(password), "it starts\n" if password else "")
    assert ("set MARS_GRAFANA_PASSWORD in .env" in done.stderr) is not bool(password)


def test_the_example_of_an_env_file_has_every_variable_with_its_default_and_no_secret() -> None:
    example = dict(re.findall(r"^#?(MARS_\w+)=(.*)$", (ROOT / ".env.example").read_text(), re.M))
    asked = dict(re.findall(r"\$\{(MARS_\w+)(?::-([^}]*)|:\?[^}]*)?\}", BASE.read_text()))
    assert example == asked
    assert {name for name, default in example.items() if not default} == {*SECRETS, "MARS_GRAFANA_PASSWORD"}


@pytest.mark.parametrize("name", AT_REDIS)
def test_who_uses_redis_knows_its_password(name: str) -> None:
    environment = _services("gpu")[name]["environment"]
    assert "${MARS_REDIS_PASSWORD:?" in environment["MARS_REDIS_URL"] and "@redis:" in environment["MARS_REDIS_URL"]


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_container_is_checked_restarted_and_without_rights(name: str) -> None:
    service = _services("gpu")[name]
    assert service["healthcheck"]["test"]
    assert service["restart"] == "unless-stopped"
    assert service["init"] is True
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service


def test_images_of_others_are_pinned_and_run_as_users_without_rights() -> None:
    others = {name: service for name, service in _services("gpu").items() if "build" not in service}
    assert set(others) == {"redis", *MONITORING}
    for service in others.values():
        assert re.search(r":v?\d+(\.\d+)+$", service["image"])
        assert service["user"] not in ("", "0", "root")


def test_what_monitoring_mounts_is_there_and_cannot_be_changed() -> None:
    for name in MONITORING:
        [volume] = [mount for mount in _services("gpu")[name]["volumes"] if mount["type"] == "volume"]
        assert volume["source"] == name
        for mount in _services("gpu")[name]["volumes"]:
            if mount["type"] == "bind":
                assert (ROOT / mount["source"]).exists() and mount["read_only"] is True


def test_services_wait_for_what_they_need_to_be_healthy() -> None:
    waits = {name: set(service.get("depends_on", {})) for name, service in _services("gpu").items()}
    assert waits == {
        "redis": set(),
        "reward": {"redis"},
        "rollout": {"redis", "reward"},
        "trainer": {"redis", "reward"},
        "ui": set(),
        "prometheus": set(),
        "grafana": {"prometheus"},
    }
    for service in _services("gpu").values():
        assert all(on == {"condition": "service_healthy"} for on in service.get("depends_on", {}).values())


def test_replicas_and_trainer_share_the_run_folder_and_cannot_change_recipes_and_models() -> None:
    for name in ("rollout", "trainer"):
        mounts = {mount["target"]: mount for mount in _services("gpu")[name]["volumes"]}
        assert mounts["/mars/runs"] == {"type": "volume", "source": "runs", "target": "/mars/runs"}
        assert mounts["/mars/recipes"]["read_only"] is True
        assert mounts["/mars/models"]["read_only"] is True


def test_the_page_can_read_runs_and_recipes_and_change_nothing() -> None:
    mounts = _services("gpu")["ui"]["volumes"]
    assert {mount["target"] for mount in mounts} == {"/mars/runs", "/mars/recipes"}
    assert all(mount["read_only"] is True for mount in mounts)


def test_the_page_waits_for_the_run_of_the_recipe_and_then_shows_it(tmp_path: Path) -> None:
    # The container's own command, in a folder that is laid out as /mars is there; the run begins while it sleeps.
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    sleep = tmp_path / "bin/sleep"
    sleep.parent.mkdir()
    sleep.write_text("#!/bin/sh\nmkdir -p runs/scene\ntouch runs/scene/events.jsonl\n")
    sleep.chmod(0o755)
    port = free_port()
    shell, option, script = _services("gpu")["ui"]["entrypoint"]
    script = script.replace("$$", "$").replace("--port 8400", f"--port {port}")
    here = {name: value for name, value in os.environ.items() if not name.startswith("MARS_")}
    here |= {"MARS_RECIPE": "recipes/scene.toml", "MARS_API_KEY": "a-key", "MARS_HOST": "127.0.0.1"}
    here["PATH"] = f"{sleep.parent}:{Path(sys.executable).parent}:{here['PATH']}"
    with subprocess.Popen([shell, option, script], cwd=tmp_path, env=here, start_new_session=True) as page:
        try:
            while not answers(port):
                assert page.poll() is None
                time.sleep(0.2)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(page.pid, signal.SIGKILL)
    assert (tmp_path / "runs/scene/events.jsonl").exists()


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_prometheus_writes_the_key_for_itself_alone_and_asks_with_it(tmp_path: Path) -> None:
    shell, option, script = _services("gpu")["prometheus"]["entrypoint"]
    script = script.replace("$$", "$").replace("/run/mars", str(tmp_path)).replace("exec prometheus", ": prometheus")
    subprocess.run([shell, option, script], env=os.environ | {"MARS_API_KEY": "a-key"}, check=True)
    key = tmp_path / "api-key"
    assert key.read_text() == "a-key" and key.stat().st_mode & 0o777 == 0o600
    scraped = (ROOT / "deploy/prometheus.yml").read_text(encoding="utf-8")
    assert "credentials_file: /run/mars/api-key" in scraped
    assert _services("gpu")["prometheus"]["tmpfs"] == ["/run/mars:uid=65534,mode=0700"]  # memory, of the user nobody


def test_every_build_target_is_a_stage_that_ends_as_a_user_without_rights() -> None:
    stages = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", DOCKERFILE.read_text(), re.M | re.S))
    for name in OURS:
        build = _services("gpu")[name]["build"]
        assert ROOT / build["dockerfile"] == DOCKERFILE
        assert re.findall(r"^USER (\S+)$", stages[build["target"]], re.M)[-1] == "mars"


def test_the_images_of_reward_and_page_are_made_without_the_torch_and_engine_stages() -> None:
    parents = {stage: parent for parent, stage in re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE.read_text(), re.M)}
    assert parents["reward"] == parents["ui"] == "base" and parents["base"] == "${BASE_IMAGE}"


@pytest.mark.parametrize("form", FORMS)
def test_compose_accepts_the_files_and_resolves_them_as_this_module_does(form: str) -> None:
    result = _config(form, "--format", "json")
    assert result.returncode == 0, result.stderr
    services = json.loads(result.stdout)["services"]
    ours = _services(form)
    assert {name: len(_gpus(service)) for name, service in services.items()} == {
        name: len(_gpus(service)) for name, service in ours.items()
    }
    assert services["rollout"]["image"] == ours["rollout"]["image"]
    assert services["trainer"]["environment"]["MARS_REDIS_URL"] == "redis://:a-password@redis:6379/0"


@pytest.mark.parametrize("missing", sorted(SECRETS))
def test_compose_refuses_to_start_without_a_secret_and_says_which(missing: str) -> None:
    result = _config("gpu", "-q", secrets=SECRETS | {missing: ""})
    assert result.returncode != 0
    assert f"required variable {missing} is missing a value: set it in .env" in result.stderr
