"""Whole model folders in Hugging Face format: there with everything in them, or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

import torch
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging

from mars_shared.errors import ConfigError
from mars_shared.files import fsync_path

_TEXT_SUFFIXES = {".json", ".jinja", ".txt", ".model"}
"""Of tokenizer, processor and chat template."""


def refuse_to_overwrite(out: Path, model: Path) -> None:
    """Refuse a target folder that holds something.

    Raises:
        ConfigError: it is the model that is trained, a file, or a folder that is not empty.
    """
    if out.resolve() == model.resolve():
        raise ConfigError(f"--out {out} is the model that would be trained (model.path); expected another folder")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out {out} exists and is not empty; expected a folder that is new or empty")


def write_model(
    model: Qwen2_5_VLForConditionalGeneration, origin: Path, out: Path, dtype: torch.dtype, extra: Mapping[str, str]
) -> None:
    """Write weights and configuration of `model`, which is cast to `dtype`, with tokenizer and processor of `origin`.

    Args:
        extra: further texts by file name.
    """
    logging.disable_progress_bar()
    out.parent.mkdir(parents=True, exist_ok=True)
    staged = out.with_name(f".{out.name}.{uuid4().hex}.tmp")
    staged.mkdir()
    try:
        model.to(dtype).save_pretrained(staged)
        for file in sorted(origin.iterdir()):
            if _is_independent_of_weights(file):
                shutil.copyfile(file, staged / file.name)
        for name, text in extra.items():
            (staged / name).write_text(f"{text}\n", encoding="utf-8")
        for file in staged.iterdir():
            file.chmod(0o644)  # safetensors makes weights that only their owner can read
            fsync_path(file)
        fsync_path(staged)
        os.replace(staged, out)
        fsync_path(out.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _is_independent_of_weights(file: Path) -> bool:
    """Whether a file of a model folder says nothing of its weights: neither their index nor their configuration."""
    is_text = file.is_file() and file.suffix in _TEXT_SUFFIXES
    return is_text and file.name != "config.json" and not file.name.endswith(".index.json")
