"""docker-compose.yml and its CPU override keep what docs/docker.md promises."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
BASE, CPU = ROOT / "docker-compose.yml", ROOT / "compose.cpu.yml"
DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
FORMS = {"gpu": [BASE], "cpu": [BASE, CPU]}
SERVICES = {"redis", "reward", "rollout", "trainer"}
OURS = sorted(SERVICES - {"redis"})
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


def _config(form: str, *options: str, secrets: dict[str, str] = SECRETS) -> subprocess.CompletedProcess[str]:
    if reason := _without_compose():
        pytest.skip(reason)
    files = [argument for path in FORMS[form] for argument in ("-f", str(path))]
    # No .env of this machine may stand in for what the test leaves out.
    command = ["docker", "compose", "--env-file", os.devnull, *files, "config", *options]
    others = {name: value for name, value in os.environ.items() if not name.startswith(("MARS_", "COMPOSE_"))}
    return subprocess.run(command, capture_output=True, text=True, env=others | secrets)


def test_there_are_redis_and_the_three_services_in_both_forms() -> None:
    assert set(_services("gpu")) == set(_services("cpu")) == SERVICES


def test_rollout_and_trainer_reserve_one_gpu_each_by_default_and_nothing_else_does() -> None:
    assert {name: len(_gpus(service)) for name, service in _services("gpu").items()} == {
        "redis": 0,
        "reward": 0,
        "rollout": 1,
        "trainer": 1,
    }


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
    for name, service in _services(form).items():
        for port in service.get("ports", []):
            assert port.startswith("${MARS_BIND:-127.0.0.1}:"), name


@pytest.mark.parametrize("name", OURS)
def test_every_service_of_ours_requires_the_key_and_the_redis_password(name: str) -> None:
    environment = _services("gpu")[name]["environment"]
    assert environment["MARS_API_KEY"].startswith("${MARS_API_KEY:?")
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


def test_services_wait_for_what_they_need_to_be_healthy() -> None:
    waits = {name: set(service.get("depends_on", {})) for name, service in _services("gpu").items()}
    assert waits == {"redis": set(), "reward": {"redis"}, "rollout": {"redis", "reward"}, "trainer": {"redis", "reward"}}
    for service in _services("gpu").values():
        assert all(on == {"condition": "service_healthy"} for on in service.get("depends_on", {}).values())


def test_replicas_and_trainer_share_the_run_folder_and_cannot_change_recipes_and_models() -> None:
    for name in ("rollout", "trainer"):
        mounts = {mount["target"]: mount for mount in _services("gpu")[name]["volumes"]}
        assert mounts["/mars/runs"] == {"type": "volume", "source": "runs", "target": "/mars/runs"}
        assert mounts["/mars/recipes"]["read_only"] is True
        assert mounts["/mars/models"]["read_only"] is True


def test_every_build_target_is_a_stage_that_ends_as_a_user_without_rights() -> None:
    stages = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", DOCKERFILE.read_text(), re.M | re.S))
    for name in OURS:
        build = _services("gpu")[name]["build"]
        assert ROOT / build["dockerfile"] == DOCKERFILE
        assert re.findall(r"^USER (\S+)$", stages[build["target"]], re.M)[-1] == "mars"


def test_the_reward_image_is_made_without_the_torch_and_engine_stages() -> None:
    parents = {stage: parent for parent, stage in re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE.read_text(), re.M)}
    assert parents["reward"] == "base" and parents["base"] == "${BASE_IMAGE}"


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
