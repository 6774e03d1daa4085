"""The authors' reference data, which is not part of the project: read from MARS_REFERENCE_DATA."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "MARS_REFERENCE_DATA"
FOLDER = os.environ.get(VARIABLE)

needs_reference_data = pytest.mark.skipif(
    FOLDER is None,
    reason=f"{VARIABLE} is unset; set it to a folder with golden_rewards.json and mars_eval/ (from github.com/AI9Stars/MARS)",
)


def reference(name: str) -> Any:
    """A JSON file of the reference data."""
    assert FOLDER is not None
    return json.loads((Path(FOLDER) / name).read_text(encoding="utf-8"))
