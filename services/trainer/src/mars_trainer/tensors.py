"""Tensors in files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written, e.g. since the disk is full; safetensors says that in words alone.
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        cause = re.search(r"\(os error (\d+)\)", str(error))
        if cause is None:
            raise
        raise OSError(int(cause[1]), os.strerror(int(cause[1])), str(path)) from error
