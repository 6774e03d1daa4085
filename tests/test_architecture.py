"""Import rules, held by import-linter (.importlinter), and proof that each of them bites."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

PACKAGES = {
    "mars_shared": "shared/src/mars_shared",
    "mars_reward": "services/reward/src/mars_reward",
    "mars_rollout": "services/rollout/src/mars_rollout",
    "mars_trainer": "services/trainer/src/mars_trainer",
}
LINT = Path(sys.executable).with_name("lint-imports")


def lint(config: Path, *, sources: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the installed packages, or on those in `sources`."""
    environment = dict(os.environ) | ({"PYTHONPATH": str(sources)} if sources else {})
    command = [LINT, "--config", config, "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=sources or config.parent, env=environment, capture_output=True, text=True)


def test_imports_keep_the_rules(root: Path) -> None:
    done = lint(root / ".importlinter")
    # Each rule's name says why it exists; import-linter prints the broken ones with the imports that break them.
    assert done.returncode == 0, f"an import breaks a rule of the architecture:\n{done.stdout}{done.stderr}"


@pytest.fixture
def copied(root: Path, tmp_path: Path) -> Path:
    """The four packages, to be spoiled."""
    for name, folder in PACKAGES.items():
        shutil.copytree(root / folder, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.parametrize(
    ("module", "line", "rule"),
    [
        ("mars_reward/registry.py", "import mars_trainer.metrics", "Services never import one another"),
        ("mars_trainer/metrics.py", "from mars_rollout import worker", "Services never import one another"),
        ("mars_shared/messages.py", "import mars_reward.registry", "mars_shared imports no service"),
        ("mars_shared/files.py", "import torch", "mars_shared imports no service and no torch"),
        (
            "mars_shared/contracts/prompt.py",
            "from mars_shared import errors",
            "mars_shared.contracts imports the standard library",
        ),
        ("mars_shared/contracts/base.py", "import fastapi", "mars_shared.contracts imports the standard library"),
        ("mars_rollout/service.py", "from vllm import LLM", "vllm is imported in"),
        ("mars_trainer/model.py", "import vllm", "vllm is imported in"),
        ("mars_trainer/loop.py", "import wandb", "wandb is imported in mars_trainer.trackers"),
        ("mars_trainer/exchange.py", "from redis.asyncio import Redis", "The redis client is imported in"),
        ("mars_shared/cli.py", "import redis", "The redis client is imported in"),
        (
            "mars_trainer/algorithm/losses.py",
            "from mars_shared.settings import Recipe",
            "mars_trainer.algorithm imports no settings",
        ),
        ("mars_trainer/algorithm/advantages.py", "import httpx", "mars_trainer.algorithm imports no settings"),
        ("mars_reward/rewards/vqa.py", "import torch", "mars_reward imports no torch"),
    ],
)
def test_a_forbidden_import_breaks_its_rule_and_the_rule_explains_itself(
    root: Path, copied: Path, module: str, line: str, rule: str
) -> None:
    spoiled = copied / module
    spoiled.write_text(f"{spoiled.read_text()}\n{line}\n")
    done = lint(root / ".importlinter", sources=copied)
    output = " ".join(done.stdout.split())
    assert done.returncode == 1, output
    broken = output.partition("Broken contracts")[2]
    assert rule in broken and module.removesuffix(".py").replace("/", ".") in broken


def test_contracts_import_nothing_beyond_the_standard_library_and_pydantic() -> None:
    graph = grimp.build_graph("mars_shared", include_external_packages=True)
    modules = {"mars_shared.contracts", *graph.find_descendants("mars_shared.contracts")}
    imported = {target for module in modules for target in graph.find_modules_directly_imported_by(module)} - modules
    strangers = {name for name in imported if name.partition(".")[0] not in (*sys.stdlib_module_names, "pydantic")}
    assert not strangers, f"mars_shared.contracts imports {sorted(strangers)}"
