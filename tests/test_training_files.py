"""Files as the samples of a run: read at the start, opened when asked for, held out by name or by hash."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from builders import V0, image_bytes
from mars_shared.blobs import BlobStore
from mars_shared.contracts import BoxesTruth, Prompt, TextTruth
from mars_shared.errors import ConfigError, InputError
from mars_shared.settings import DataFiles, DataSection, Recipe, load_recipe
from mars_trainer.data import main
from mars_trainer.datasets import open_data, open_held_out
from mars_trainer.dispatch import PromptMaker

pytestmark = pytest.mark.usefixtures("clean_environment")


def line(number: int, *names: str, answer: Any = "7", **more: Any) -> dict[str, Any]:
    sources = [{"name": name, "image": f"{number}-{name}.png"} for name in names]
    return {"id": f"q{number}", "question": "Which digit?", "answer": answer, "sources": sources, **more}


def write(folder: Path, *lines: dict[str, Any], file: str = "questions.jsonl") -> Path:
    """A file of questions with its images beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in lines:
        for source in entry["sources"]:
            (folder / source["image"]).write_bytes(image_bytes((60, 40)))
    path = folder / file
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    return path


def section(train: Path, test: Path | None = None, **more: Any) -> DataSection:
    return DataSection(train=(DataFiles(path=train),), test=(DataFiles(path=test),) if test else (), **more)


def test_rows_become_samples_with_as_many_sources_as_they_have(tmp_path: Path) -> None:
    boxes = [[1, 2, 30, 40]]
    train = write(
        tmp_path, line(0, "visible", "infrared"), line(1, *(f"view-{n}" for n in range(6)), answer=boxes, think="Look.")
    )
    test = write(tmp_path / "test", line(2, "depth"))
    data = open_data(section(train, test))
    pair, views = data.train
    assert (pair.prompt_id, list(pair.images), pair.truth) == ("questions/q0", ["visible", "infrared"], TextTruth(text="7"))
    assert len(views.images) == 6 and views.thought == "Look."
    assert views.truth == BoxesTruth(boxes=((1, 2, 30, 40),), width_px=60, height_px=40)
    assert [sample.prompt_id for sample in data.held_out["questions"]] == ["questions/q2"]


def test_images_are_opened_when_their_sample_is_asked_for_and_a_missing_one_is_named(tmp_path: Path) -> None:
    train = write(tmp_path, line(0, "visible"), line(1, "visible"))
    data = open_data(section(train, write(tmp_path / "test", line(2, "visible"))))
    (tmp_path / "1-visible.png").unlink()
    assert data.train[0].images
    with pytest.raises(InputError, match=r"questions.jsonl line 2: source 'visible': .*1-visible.png cannot be read"):
        data.train[1]


def test_faulty_rows_are_all_counted_and_the_first_are_named_at_the_start(tmp_path: Path) -> None:
    lines = [line(number, "visible") for number in range(4)]
    del lines[1]["question"]
    lines[3]["answer"] = ""
    with pytest.raises(ConfigError, match=r"2 of 4 rows cannot be used: .*line 2: question.*line 4: answer.*mars data check"):
        open_data(section(write(tmp_path, *lines)))


def test_a_few_faulty_rows_are_named_in_the_log_and_cannot_be_opened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [line(number, "visible") for number in range(20)]
    lines[4]["answer"] = 7
    data = open_data(section(write(tmp_path, *lines)))
    assert "1 of 20 rows cannot be used" in caplog.text and "line 5: answer" in caplog.text
    unusable = []
    for row in range(len(data.train)):
        try:
            assert data.train[row].images
        except InputError as error:
            unusable.append(str(error))
    assert len(unusable) == 1 and "line 5: answer" in unusable[0]
    with pytest.raises(ConfigError, match=r"1 of 20 rows cannot be used.*data.max_faulty_share is 0$"):
        open_data(section(tmp_path / "questions.jsonl", max_faulty_share=0.0))


def test_a_source_that_the_policy_does_not_know_is_refused_at_the_start(tmp_path: Path) -> None:
    path = write(tmp_path, line(0, "visible"), line(1, "thermal"))
    with pytest.raises(ConfigError, match=r"line 2: source 'thermal' is not one of data.source_names \(visible, infrared\)"):
        open_data(section(path, source_names=("visible", "infrared")))


def test_a_row_with_several_unknown_sources_is_one_faulty_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [line(number, "visible", "infrared") for number in range(9)] + [line(9, "thermal", "depth", "radar")]
    path = write(tmp_path, *lines)
    assert open_data(section(path, source_names=("visible", "infrared"))).train  # 1 of 10 rows, and max_faulty_share is 0.1
    assert "1 of 10 rows cannot be used" in caplog.text
    for name in ("thermal", "depth", "radar"):
        assert f"line 10: source '{name}' is not one of data.source_names (visible, infrared)" in caplog.text


def test_the_check_that_is_named_finds_what_the_run_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "my data", *(line(number, "visible") for number in range(19)), line(19, "thermal"))
    files = DataFiles(path=path, format="jsonl", images=path.parent)
    open_data(DataSection(train=(files,), source_names=("visible", "infrared")))
    (command,) = re.findall("`mars data (.*)` lists all faults", caplog.text)
    assert main(shlex.split(command)) == 3
    said = capsys.readouterr().out.splitlines()
    assert "line 20: source 'thermal' is not one of data.source_names (visible, infrared)" in said[0]
    assert said[1].endswith("20 rows of format jsonl, 19 without a fault")


def test_a_share_is_held_out_and_rows_about_the_same_images_stay_together(tmp_path: Path) -> None:
    lines = [line(number // 2, "visible") | {"id": f"row-{number}"} for number in range(200)]
    data = open_data(section(write(tmp_path, *lines), test_share=0.25))
    held_out = {sample.prompt_id for sample in data.held_out["questions"]}
    trained = {sample.prompt_id for sample in data.train}
    assert len(trained) + len(held_out) == 200 and not trained & held_out
    assert 20 <= len(held_out) <= 80
    pairs = [{f"questions/row-{n}", f"questions/row-{n + 1}"} for n in range(0, 200, 2)]
    assert all(pair <= held_out or pair <= trained for pair in pairs)


def test_of_a_few_rows_one_is_held_out(tmp_path: Path) -> None:
    data = open_data(section(write(tmp_path, line(0, "visible"), line(1, "visible"))))
    assert (len(data.train), len(data.held_out["questions"])) == (1, 1)
    with pytest.raises(ConfigError, match="no row to train on, 1 held out"):
        open_data(section(write(tmp_path / "one", line(0, "visible"))))


def test_a_folder_with_one_data_file_stands_for_it(tmp_path: Path) -> None:
    path = write(tmp_path / "set", line(0, "visible"), line(1, "visible"))
    data = open_data(section(path.parent, path.parent))
    assert [sample.prompt_id for sample in data.train] == ["set/q0", "set/q1"] and list(data.held_out) == ["set"]
    (path.parent / "more.json").write_text("[]")
    with pytest.raises(ConfigError, match="found more.json, questions.jsonl; name the file to read"):
        open_data(section(path.parent, path.parent))


def test_a_selection_of_many_held_out_rows_is_spread_over_them_and_always_the_same(tmp_path: Path) -> None:
    path = write(tmp_path, *(line(n, "visible") for n in range(60)))
    first, again = (open_held_out(section(path, path, eval_samples=20))["questions"] for _ in range(2))
    rows = [int(sample.prompt_id.removeprefix("questions/q")) for sample in first]
    assert rows == sorted(rows) == [int(sample.prompt_id.removeprefix("questions/q")) for sample in again]
    assert len(set(rows)) == 20 and rows[0] < 20 and rows[-1] >= 40


def test_an_evaluation_uses_so_many_samples_of_each_dataset(tmp_path: Path) -> None:
    files = [
        DataFiles(path=write(tmp_path / name, *(line(n, "visible") for n in range(5)), file=f"{name}.jsonl")) for name in "ab"
    ]
    held_out = open_held_out(DataSection(dataset="digits", test=tuple(files), eval_samples=3))
    assert {name: len(samples) for name, samples in held_out.items()} == {"a": 3, "b": 3}


def test_two_held_out_datasets_of_one_name_are_refused(tmp_path: Path) -> None:
    files = [DataFiles(path=write(tmp_path / name, line(0, "visible"))) for name in "ab"]
    with pytest.raises(ConfigError, match="two held-out datasets are called 'questions'"):
        open_held_out(DataSection(dataset="digits", test=tuple(files)))


def test_a_run_trains_on_either_a_dataset_or_files() -> None:
    with pytest.raises(ValidationError, match="neither of data.dataset and data.train"):
        DataSection()
    with pytest.raises(ValidationError, match="both of data.dataset and data.train"):
        DataSection(dataset="digits", train=(DataFiles(path=Path("a.jsonl")),))


@pytest.mark.parametrize("wrong", [{"path": "nothing.jsonl"}, {"path": "x.txt"}, {"path": "x.jsonl", "format": "csv"}])
def test_files_that_cannot_be_read_are_named(tmp_path: Path, wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"nothing.jsonl|x.txt|'csv' is unknown; expected one of authors"):
        open_data(DataSection(train=(DataFiles(**{**wrong, "path": str(tmp_path / wrong["path"])}),)))


def test_a_recipe_names_files_in_tables_and_the_environment_may_name_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.toml").write_text(
        """
[run]
name = "r"
dir = "runs/r"
[model]
path = "models/tiny"
max_model_len = 64
[[data.train]]
path = "data/LLVIP"
split = "train"
sources = ["visible", "infrared"]
[rollout]
num_generations = 2
max_completion_length = 8
[train]
steps = 1
prompts_per_step = 1
learning_rate = 1e-3
"""
    )
    (files,) = load_recipe(tmp_path / "recipe.toml").data.train
    assert (files.path, files.split, files.sources) == (Path("data/LLVIP"), "train", ("visible", "infrared"))
    monkeypatch.setenv("MARS_DATA__TEST", '[{"path": "a.json"}]')
    assert load_recipe(tmp_path / "recipe.toml").data.test == (DataFiles(path=Path("a.json")),)


def test_a_sample_of_a_file_becomes_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    train = write(tmp_path, line(0, "visible", "infrared"))
    recipe = Recipe.model_validate(
        {
            "run": {"name": "r", "dir": tmp_path},
            "model": {"path": tmp_path, "max_model_len": 64},
            "data": {"train": [{"path": train}], "test": [{"path": train}]},
            "rollout": {"num_generations": 2, "max_completion_length": 8},
            "train": {"steps": 1, "prompts_per_step": 1, "learning_rate": 1e-3},
        }
    )
    maker = PromptMaker(recipe, BlobStore(tmp_path / "blobs"))
    prompt: Prompt = maker.training(open_data(recipe.data).train[0], epoch=0, dispatch_index=0, version=V0)
    assert prompt.prompt_id == "questions/q0" and [source.name for source in prompt.sources] == ["visible", "infrared"]
