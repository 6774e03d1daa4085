"""What a model folder must hold before anything heavy is started with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mars_shared.errors import ConfigError

MODEL_TYPE = "qwen2_5_vl"
REQUIRED_FILES = {
    "config.json": "the model's configuration",
    "tokenizer.json": "a fast tokenizer",
    "tokenizer_config.json": "the tokenizer's settings",
    "preprocessor_config.json": "the image processor's settings",
}


def check_model_folder(folder: Path) -> dict[str, Any]:
    """Refuse a folder that cannot be a policy; returns its config.json.

    Raises:
        ConfigError: no such folder, a file missing, or another architecture.
    """
    if not folder.is_dir():
        raise ConfigError(f"model folder {folder}: no such folder; expected a model in Hugging Face format")
    for name, meaning in REQUIRED_FILES.items():
        if not (folder / name).is_file():
            raise ConfigError(f"model folder {folder}: {name} is missing; expected {meaning} in Hugging Face format")
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"model folder {folder}: no *.safetensors file; expected the weights")
    config = read_config(folder)
    if (kind := config.get("model_type")) != MODEL_TYPE:
        raise ConfigError(f"model folder {folder}: model_type is {kind!r}; expected {MODEL_TYPE!r}")
    if not isinstance(config.get("image_token_id"), int):
        raise ConfigError(f"model folder {folder}: config.json has no image_token_id; expected the image placeholder's token id")
    return config


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json, of whatever architecture.

    Raises:
        ConfigError: it cannot be read, or holds no JSON object.
    """
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"model folder {folder}: config.json cannot be read ({error.strerror}); expected a model") from error
    except ValueError as error:
        raise ConfigError(f"model folder {folder}: config.json is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"model folder {folder}: config.json holds a {type(config).__name__}; expected an object")
    return config
