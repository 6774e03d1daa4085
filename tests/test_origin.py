"""What a start of the trainer writes down about itself: the resolved recipe without secrets, versions, the machine."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import pytest

from mars_shared.masking import without_credentials
from mars_shared.records.start import RunStart
from mars_shared.settings import load_recipe
from mars_trainer.origin import run_start


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/run", "s3://bucket/run"),
        ("http://trainer:8300", "http://trainer:8300"),
        ("s3://key:secret@bucket/run", "s3://***@bucket/run"),
        ("ftp://token@host", "ftp://***@host"),
        ("s3://key:se/cr@et@bucket/run", "s3://***@bucket/run"),
        ("s3://key:se?cret@bucket", "s3://***@bucket"),
        ("key:secret@bucket", "***@bucket"),
        ("abfs://run?sig=secret&se=1", "abfs://run?***"),
        ("https://key:secret@host/run?token=secret", "https://***@host/run?***"),
    ],
)
def test_who_may_read_an_address_is_not_in_what_is_shown_of_it(url: str, shown: str) -> None:
    assert without_credentials(url) == shown and "secret" not in shown


def test_a_start_has_every_setting_as_it_was_resolved(root: Path, clean_environment: pytest.MonkeyPatch) -> None:
    clean_environment.setenv("MARS_TRAIN__STEPS", "7")
    clean_environment.setenv("MARS_WEIGHTS__URL", "s3://key:secret@bucket/run")
    recipe = load_recipe(root / "recipes/digits.toml")
    start = run_start(recipe, incarnation=3, model="f00d")
    written = json.dumps(start.model_dump(mode="json"), allow_nan=False)
    assert RunStart.model_validate_json(written) == start and (start.incarnation, start.model) == (3, "f00d")
    assert start.recipe["train"]["steps"] == 7 and start.recipe["run"]["dir"] == "runs/digits"
    assert start.recipe["train"]["epsilon_high"] == 0.2  # not in the file: a default
    assert start.recipe["weights"]["url"] == "s3://***@bucket/run" and "secret" not in written
    assert start.recipe.keys() == type(recipe).model_fields.keys()


def test_a_start_names_versions_and_machine(root: Path, clean_environment: pytest.MonkeyPatch) -> None:
    start = run_start(load_recipe(root / "recipes/digits.toml"), incarnation=1, model="f00d")
    assert start.versions["python"] == platform.python_version() and start.versions["torch"] == version("torch")
    assert start.versions["mars-trainer"] == version("mars-trainer") and "no-such-package" not in start.versions
    assert start.host.cores == len(os.sched_getaffinity(0)) and start.host.cpu
