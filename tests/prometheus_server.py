"""A real Prometheus on loopback, with the shipped jobs and alert rules, that scrapes what a test names."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import yaml

from rollout_fixtures import free_port
from tools import prometheus_path

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
PATIENCE_S = 120.0
"""A busy machine may take so long; a test that waits in vain fails then."""


class PrometheusServer:
    """deploy/prometheus-local.yml with other targets, every second.

    with PrometheusServer(tmp_path, {"trainer": ["127.0.0.1:8300"]}, api_key="s3cret") as server:
        server.wait_until_scraped()
        server.query('mars_train_step{run="digits"}')  # [{"metric": {"run": "digits", ...}, "value": [time, "7"]}]

    Args:
        folder: for its configuration, data and log.
        targets: addresses by job; a job of the shipped configuration that is left out has none.
        api_key: sent with every scrape; none sends an empty one, as the shipped configuration does.
    """

    def __init__(self, folder: Path, targets: Mapping[str, Sequence[str]], api_key: str = "") -> None:
        self._folder = folder
        self._targets = targets
        self._api_key = api_key
        self._process: subprocess.Popen[bytes] | None = None
        self._http: httpx.Client | None = None

    def __enter__(self) -> Self:
        port = free_port()
        command = [
            prometheus_path(),
            f"--config.file={self._write_config()}",
            f"--storage.tsdb.path={self._folder / 'prometheus-data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False)
        try:
            self._wait(self._is_ready, "it is not ready")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._end()

    def query(self, expression: str, at: float | None = None) -> list[dict[str, Any]]:
        """The instant query's samples now, or at a unix time: `metric` (labels) and `value` (time, number as text)."""
        time_of = {} if at is None else {"time": str(at)}
        return self._get("/api/v1/query", query=expression, **time_of)["result"]

    def targets(self) -> dict[str, list[str]]:
        """Health ("up", "down", "unknown") of the targets by job."""
        found: dict[str, list[str]] = {}
        for target in self._get("/api/v1/targets")["activeTargets"]:
            found.setdefault(target["labels"]["job"], []).append(target["health"])
        return found

    def alerts(self) -> list[str]:
        """Names of the loaded alerts."""
        groups = self._get("/api/v1/rules")["groups"]
        return [rule["name"] for group in groups for rule in group["rules"]]

    def wait_until_scraped(self, times: int = 2) -> None:
        """Return when every target has answered so many times; rates need two.

        Raises:
            AssertionError: one has not within PATIENCE_S.
        """
        self._wait_for_all(f"sum_over_time(up[1h]) >= {times}", "not every target answers")

    def wait_until_known(self) -> None:
        """Return when every target was asked once, whatever it answered."""
        self._wait_for_all("up", "not every target was asked")

    def _wait_for_all(self, expression: str, otherwise: str) -> None:
        wanted = sum(len(addresses) for addresses in self._targets.values())
        self._wait(lambda: len(self.query(expression)) == wanted, otherwise)

    def _is_ready(self) -> bool:
        assert self._http is not None
        try:
            return self._http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def _get(self, path: str, **parameters: str) -> Any:
        assert self._http is not None
        answer = self._http.get(path, params=parameters).json()
        assert answer["status"] == "success", f"{parameters}: {answer}"
        return answer["data"]

    def _wait(self, holds: Callable[[], bool], otherwise: str) -> None:
        assert self._process is not None
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert self._process.poll() is None and time.monotonic() < deadline, f"{otherwise}:\n{self._log.read_text()[-2000:]}"
            time.sleep(0.1)

    def _write_config(self) -> Path:
        config = yaml.safe_load((DEPLOY / "prometheus-local.yml").read_text(encoding="utf-8"))
        key = self._folder / "api-key"
        key.write_text(self._api_key)
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(DEPLOY / name) for name in config["rule_files"]]
        for job in config["scrape_configs"]:
            job["authorization"] = {"credentials_file": str(key)}
            job["static_configs"] = [{"targets": list(self._targets.get(job["job_name"], ()))}]
        assert set(self._targets) <= {job["job_name"] for job in config["scrape_configs"]}
        path = self._folder / "prometheus.json"
        path.write_text(json.dumps(config))  # which is YAML as well
        return path

    @property
    def _log(self) -> Path:
        return self._folder / "prometheus.log"

    def _end(self) -> None:
        if self._http is not None:
            self._http.close()
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
