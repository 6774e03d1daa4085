"""The documents say what the code is: settings, metrics, routes, subcommands, links and paths."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from typer.main import get_command

from builders import scored_with
from mars_reward.app import build_app as reward_app
from mars_reward.offline import main as score_file
from mars_rollout.app import build_app as rollout_app
from mars_shared.cli import app as command_line
from mars_shared.contracts import PolicyVersion, ScoredGroup, VersionSpan
from mars_shared.settings import Deployment, TrainSection
from mars_shared.weights import WeightsStore
from mars_trainer.app import build_app as trainer_app
from mars_trainer.batch import Batch
from mars_trainer.credit import credit
from mars_trainer.datasets.formats import read_records
from mars_trainer.datasets.prompt_length import PromptRuler
from mars_trainer.exposition import prometheus_name
from mars_trainer.learner import _metrics as learner_metrics
from mars_trainer.metrics import rollout_metrics, staleness_metrics
from mars_trainer.progress import Progress

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SOURCES = [ROOT / "shared/src", *sorted(ROOT.glob("services/*/src"))]
FOLDERS = {path.name for base in (ROOT, *SOURCES) for path in base.iterdir() if path.is_dir()} - {"runs", ".venv", "mars"}
SUFFIXES = {".py", ".md", ".toml", ".yml", ".txt", ".sh", ".jinja"}

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def code_of(document: Path) -> Iterator[str]:
    """What stands in code blocks, line by line, and in code spans."""
    text = document.read_text(encoding="utf-8")
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S):
        yield from block.splitlines()
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def table_keys(name: str, column: int) -> set[str]:
    """What stands in code spans in a column of a document's tables."""
    lines = (ROOT / "docs" / name).read_text(encoding="utf-8").splitlines()
    cells = [line.split(" | ")[column].strip("| ") for line in lines if line.startswith("| ") and line.count(" | ") > column]
    return {key for cell in cells for key in re.findall(r"`([^`]+)`", cell)}


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_settings", ROOT / "docs/generate_settings.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_settings_document_is_the_one_that_the_declarations_make() -> None:
    written = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    assert written == load_generator().render(), "docs/settings.md is stale; run: .venv/bin/python docs/generate_settings.py"


def test_every_variable_of_ours_is_documented() -> None:
    files = [*ROOT.glob("*compose*.yml"), *ROOT.glob("deploy/**/*.py"), ROOT / "Makefile", ROOT / ".ci/run"]
    files += [file for source in SOURCES for file in source.rglob("*.py")]
    used = {name for file in files for name in re.findall(r"\bMARS_[A-Z0-9_]*[A-Z0-9]\b", file.read_text(encoding="utf-8"))}
    documented = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("settings.md", "docker.md"))
    assert used - set(re.findall(r"MARS_[A-Z0-9_]+", documented)) == set()


@each_document
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8"))
    for link in [link for link in links if not re.match(r"[a-z]+:", link)]:
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{document.name}: {link} leads nowhere"
        assert not anchor or anchor in anchors_of(target), f"{document.name}: {link} names no heading"


def anchors_of(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_every_path_that_is_named_exists(document: Path) -> None:
    for code in code_of(document):
        for word in re.findall(r"(?<![\w/.:<$-])[\w.][\w.*-]*(?:/[\w.*-]+)*/?(?![\w/<{])", code):
            if is_path(word):
                assert exists(word), f"{document.name}: there is no {word}"


def is_path(word: str) -> bool:
    first, slash, _ = word.partition("/")
    inside = bool(slash) and first in FOLDERS
    return "..." not in word and (inside or (not slash and Path(word).suffix in SUFFIXES))


def exists(word: str) -> bool:
    """From the root, or inside a package; capitals may stand for any word (constraints-STACK.txt)."""
    patterns = (word.rstrip("/"), re.sub(r"[A-Z]{2,}", "*", word.rstrip("/")))
    bases = (ROOT, ROOT / "docs", *SOURCES, *(package for source in SOURCES for package in source.iterdir() if package.is_dir()))
    return any(next(base.glob(pattern), None) is not None for base in bases for pattern in patterns)


def subcommands() -> set[str]:
    command: Any = get_command(command_line)
    return set(command.commands)


@each_document
def test_every_documented_subcommand_exists(document: Path) -> None:
    named = {name for code in code_of(document) for name in re.findall(r"(?:^|[\s/(])mars ([a-z][a-z-]*)", code)}
    assert named - subcommands() == set()


def test_every_subcommand_is_documented() -> None:
    code = "\n".join(line for document in DOCUMENTS for line in code_of(document))
    assert {name for name in subcommands() if f"mars {name}" not in code} == set()


def routes_of(app: FastAPI) -> set[str]:
    return {f"{method} {route.path}" for route in app.routes if isinstance(route, APIRoute) for method in route.methods}


def openai_routes() -> set[str]:
    """Read from the source, since importing vLLM takes long."""
    tree = ast.parse((ROOT / "services/rollout/src/mars_rollout/engine/http.py").read_text(encoding="utf-8"))
    values = [n.value for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "OPENAI_ROUTES"]
    assert isinstance(values[0], ast.Call)
    return set(ast.literal_eval(values[0].args[0]))


def test_every_route_is_documented_and_every_documented_route_exists(
    clean_environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    stage: Any = None
    progress = Progress(run="test", steps=1, version=PolicyVersion(incarnation=1, step=0))
    apps = (
        reward_app(Deployment(), recipe="paper", ready=lambda: None),
        rollout_app(Deployment(), stage, ready=lambda: None),
        trainer_app(Deployment(), progress, WeightsStore(tmp_path)),
    )
    assert set(re.findall(r"^### `(\w+ /\S+)`$", text, re.M)) == {route for app in apps for route in routes_of(app)}
    openai = text.partition("### vLLM's OpenAI routes")[2].partition("## Reward service")[0]
    assert set(re.findall(r"`(?:GET|POST) (/\S+)`", openai)) == openai_routes()


def with_spans(scored: ScoredGroup) -> ScoredGroup:
    group = scored.group
    spans = (VersionSpan(version=group.policy_version, start=0, end=3),)
    completions = tuple(completion.model_copy(update={"spans": spans}) for completion in group.completions)
    return scored.model_copy(update={"group": group.model_copy(update={"completions": completions})})


def test_every_training_metric_is_documented_and_the_other_way_round() -> None:
    scored = scored_with((1, 0), {"visible": (1,), "infrared": (0,)})
    credits = [credit(scored, TrainSection(steps=1, prompts_per_step=1, learning_rate=1e-3), 8)]
    totals: Any = dict.fromkeys(("loss", "kl", "entropy", "clip_low", "clip_high", "clip_dual", "grad_norm", "tokens"), 1.0)
    totals |= {"sampler_difference": 1.0, "sampler_difference_max": 1.0}
    found = set(rollout_metrics([scored], credits) | learner_metrics(totals, updates=1, learning_rate=1.0))
    found |= set(Batch(wanted=1, kept=(), dropped=()).metrics | staleness_metrics([with_spans(scored)], 3))
    found |= {"efficiency"}  # of the step's times alone
    rows = re.findall(r"^\| `([^`]+)` \| `([^`{]+)\{", section("metrics.md", "Of a step"), re.M)
    assert {slash for slash, _ in rows} == {generic(name) for name in found}
    assert dict(rows) == {generic(name): prometheus_name(name) for name in found}


def generic(slash_name: str) -> str:
    return re.sub(r"^gain/.*", "gain/<source>", re.sub(r"^reward/.*", "reward/<part>", slash_name))


def section(document: str, heading: str) -> str:
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    return text.partition(f"## {heading}\n")[2].partition("\n## ")[0]


def test_every_event_of_ours_is_documented_and_the_other_way_round() -> None:
    text = "".join(file.read_text(encoding="utf-8") for source in SOURCES for file in source.rglob("*.py"))
    written = {name for pair in re.findall(r'\.write\(\s*"(\w+)"(?: if \w+ else "(\w+)")?,', text) for name in pair if name}
    documented = set(re.findall(r"^\| `(\w+)` \|", section("metrics.md", "Event log"), re.M))
    assert documented == written | {"evaluation", "evaluated"}  # these two are written by one call, which names neither


def json_lines(name: str, heading: str) -> list[dict[str, Any]]:
    """The lines of the JSON block below a heading of a document."""
    section = (ROOT / "docs" / name).read_text(encoding="utf-8").partition(f"## {heading}\n")[2]
    return [json.loads(line) for line in section.partition("```json\n")[2].partition("\n```\n")[0].splitlines()]


def test_the_documented_formats_earn_the_whole_reward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json_lines("rewards.md", "The format that earns a reward")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert score_file([str(tmp_path / "rows.jsonl")]) == 0
    # Format 0.5 and accuracy 1; format 0.75 and IoU 1.
    assert [json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()] == [1.5, 1.75]


def test_the_documented_questions_are_put_to_the_model_as_they_stand(tmp_path: Path) -> None:
    lines = json_lines("data.md", "Say which format you want")
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ruler = PromptRuler(ROOT / "models/tiny")
    for record, line in zip(read_records(tmp_path / "questions.jsonl", "jsonl"), lines, strict=True):
        text = ruler.text(record.question, [image.name for image in record.images])
        image = "<|vision_start|><|image_pad|><|vision_end|>"
        assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")
        assert f"user\nvisible: {image} infrared: {image} {line['question']}<|im_end|>" in text
