"""Writes docs/settings.md from the settings' own declarations: python docs/generate_settings.py"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from mars_shared.settings import DataFiles, Deployment, Recipe

OUTPUT = Path(__file__).with_name("settings.md")
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
NAMES = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path", SecretStr: "text"}

OTHER_VARIABLES = {
    "MARS_STACK": ("found out", "`make`: `cpu` or `cuda`, whatever hardware is there"),
    "MARS_FAULT": (
        "unset",
        "for proofs alone: comma-separated `POINT[@PASS][:full]` of `mars_shared/faults.py`; the process kills itself there (`full`: "
        "finds the disk full), each once a run",
    ),
    "MARS_LOG_IDENTITY": (
        "unset",
        "set by every service for its child processes: the names under which they log; not for people to set",
    ),
    "MARS_REFERENCE_DATA": ("unset", "tests: folder with `golden_rewards.json`; without it the tests that need it are skipped"),
    "MARS_CHROMIUM": ("found on PATH", "tests: the browser; without one the tests that need it are skipped"),
    "MARS_PROMETHEUS": ("found on PATH", "tests: the Prometheus server, likewise"),
    "MARS_PROMTOOL": ("found on PATH", "tests: Prometheus's promtool, likewise"),
}
"""Read by tools and not by services."""

HEAD = """\
# Settings

<!-- Written by docs/generate_settings.py; change the declarations in mars_shared/settings.py and run it again. -->

A run is one TOML recipe (`recipes/digits.toml` is one); where things run comes from the environment. Both are declared
in `mars_shared/settings.py`.

- Every key of a recipe can be overridden from the environment: `[train] steps` by `MARS_TRAIN__STEPS=10` (two
  underscores between section and key; lists as JSON: `MARS_TRAIN__ADAM_BETAS='[0.9, 0.95]'`).
- An unknown key, a wrong type or a value out of range ends the command with exit code 2 and one line that names it.
- Paths are relative to the folder in which a command is started.

## Recipe
"""

TAIL = """\
Further rules: `rollout.max_completion_length` is less than `model.max_model_len`; greedy `rollout.mono_decoding` needs
`rollout.num_mono` of 0 or 1. Evaluations always make one greedy completion with all sources and one with each alone.
"""

ENVIRONMENT = """\
## Environment

Read by every service and by `mars`.
"""

OTHERS = """\
Read by tools alone:
"""

LAST = """\
`mars up`, `mars train`, `mars eval` and `mars demo` set `MARS_REWARD_URL` for the replicas that they start and, where
`MARS_REDIS_URL` is unset, start a Valkey of their own and set it. `mars demo` sets `MARS_RUN__SEED` and `MARS_RUN__DIR`;
`mars eval` sets `MARS_DATA__TEST` and `MARS_DATA__SOURCE_NAMES` for `--data` and `MARS_DATA__EVAL_SAMPLES` for `--samples`.
Variables of the containers are listed in [docker.md](docker.md#variables).
"""


def render() -> str:
    """The whole document."""
    recipe = [part for name, section in Recipe.model_fields.items() for part in (f"### [{name}]\n", _section(section))]
    files = ["### [[data.train]] and [[data.test]]\n", _keys(DataFiles)]
    variables = _table("variable", (_row(f"MARS_{name.upper()}", field) for name, field in Deployment.model_fields.items()))
    others = ["| variable | default | meaning |", "|---|---|---|"]
    others += [f"| `{name}` | {default} | {meaning} |" for name, (default, meaning) in OTHER_VARIABLES.items()]
    return "\n".join([HEAD, *recipe, *files, TAIL, ENVIRONMENT, variables, OTHERS, "\n".join(others) + "\n", LAST])


def _section(section: FieldInfo) -> str:
    model = section.annotation
    assert isinstance(model, type) and issubclass(model, BaseModel)
    return _keys(model)


def _keys(model: type[BaseModel]) -> str:
    return _table("key", (_row(key, field) for key, field in model.model_fields.items()))


def _table(first: str, rows: Iterator[str]) -> str:
    return "\n".join([f"| {first} | value | default | meaning |", "|---|---|---|---|", *rows]) + "\n"


def _row(name: str, field: FieldInfo) -> str:
    if not field.description:
        raise LookupError(f"setting {name} has no description; give it one where it is declared")
    pairs = [(sign, getattr(item, key, None)) for item in field.metadata for key, sign in BOUNDS.items()]
    bounds = ", ".join(f"{sign} {limit}" for sign, limit in pairs if limit is not None)
    value = f"{_type(field.annotation)} {bounds}".strip()
    return f"| `{name}` | {value} | {_default(field)} | {field.description} |"


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return " or ".join(f"`{member.value}`" for member in annotation)
    if get_origin(annotation) is tuple and Ellipsis in get_args(annotation):
        item = get_args(annotation)[0]
        if get_origin(item) is Literal:
            return f"list of {_type(item)}"
        return "list of tables" if isinstance(item, type) and issubclass(item, BaseModel) else "list of text"
    if get_origin(annotation) is tuple:
        return f"{len(get_args(annotation))} numbers"
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    return _type(kinds[0]) if kinds else NAMES[annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is None:
        return "unset"
    value = field.default
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value)}`" if isinstance(value, tuple) else f"`{value}`"


if __name__ == "__main__":
    OUTPUT.write_text(render(), encoding="utf-8")
