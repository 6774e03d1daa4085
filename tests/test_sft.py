"""Supervised fine-tuning of a recipe's model: what is imitated, and the folder that comes out."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from builders import image_bytes
from mars_shared import cli
from mars_shared.contracts import BoxesTruth, FrameKind, TextTruth
from mars_shared.errors import ConfigError, InputError, TooLongError
from mars_shared.model_folder import check_model_folder
from mars_shared.settings import Recipe, load_recipe
from mars_trainer.datasets import Sample, load_dataset
from mars_trainer.datasets.thoughts import split_thought
from mars_trainer.dispatch import place_of
from mars_trainer.imitation import first_alternative
from mars_trainer.model import load_policy
from mars_trainer.sft import FineTuning, sft

ROOT = Path(__file__).parents[1]
BOXES = BoxesTruth(boxes=((10, 20, 50, 80),), width_px=100, height_px=200)


@pytest.fixture
def recipe(tmp_path: Path, clean_environment: pytest.MonkeyPatch) -> Recipe:
    """Twelve steps of eight digits with a copy of the tiny policy, in small microbatches."""
    shutil.copytree(ROOT / "models" / "tiny", tmp_path / "tiny")
    return small(load_recipe(ROOT / "recipes" / "digits.toml"), tmp_path / "tiny")


def small(recipe: Recipe, model: Path, **more: Any) -> Recipe:
    short = recipe.sft.model_copy(update={"steps": 12, "samples_per_step": 8, "learning_rate": 1e-3, "warmup_steps": 2} | more)
    return recipe.model_copy(
        update={
            "sft": short,
            "model": recipe.model.model_copy(update={"path": model}),
            "train": recipe.train.model_copy(update={"tokens_per_microbatch": 256, "threads": 1}),
        }
    )


def with_model(recipe: Recipe, **more: Any) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=more)})


def sample(**more: Any) -> Sample:
    pair = {"visible": image_bytes((100, 200)), "infrared": image_bytes((100, 200))}
    return replace(Sample("rows.jsonl line 3", "Which?", pair, TextTruth(text="7"), thought="both is clear"), **more)


def said(tuning: FineTuning, shown: Sample) -> str:
    (ids,) = tuning.encode(shown).completions
    return tuning.policy.processor.tokenizer.decode(ids, skip_special_tokens=False)


def test_training_lowers_the_loss_and_writes_a_model_that_loads(recipe: Recipe, tmp_path: Path) -> None:
    rows = load_dataset("digits").train
    samples = [rows[place_of(index, rows=len(rows), seed=0).row] for index in range(24)]
    before = FineTuning(recipe, "answer").step(samples, 1)  # high: the tiny policy always thinks first
    lines: list[str] = []
    out = sft(recipe, tmp_path / "out", lines.append, target="answer")
    after = FineTuning(with_model(recipe, path=out), "answer").step(samples, 1)
    assert after < 0.5 * before
    assert lines[0].startswith("sft: step 1 of 12, loss ") and lines[-1].startswith("sft: step 12 of 12, loss ")
    assert check_model_folder(out)["dtype"] == "float32"
    facts = json.loads((out / "sft.json").read_text())
    assert facts.pop("loss") == pytest.approx(float(lines[-1].split("loss ")[1].split(",")[0]), abs=1e-4)
    assert facts == {"recipe": "digits", "target": "answer", "steps": 12}
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (recipe.model.path / name).read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_equal_seeds_give_equal_weights_and_another_seed_gives_others(recipe: Recipe, tmp_path: Path) -> None:
    short = small(recipe, recipe.model.path, steps=2)
    other = short.model_copy(update={"run": short.run.model_copy(update={"seed": 1})})
    folders = [sft(item, tmp_path / str(index), lambda line: None) for index, item in enumerate((short, short, other))]
    first, second, third = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert first == second != third


def test_weights_are_written_in_the_dtype_of_the_recipe(recipe: Recipe, tmp_path: Path) -> None:
    out = sft(with_model(small(recipe, recipe.model.path, steps=1), dtype="bfloat16"), tmp_path / "out", lambda line: None)
    assert check_model_folder(out)["dtype"] == "bfloat16"
    assert load_policy(out, torch.bfloat16).model.lm_head.weight.dtype is torch.bfloat16


def test_the_loss_is_over_the_completion_and_the_end_token_alone(recipe: Recipe) -> None:
    tuning = FineTuning(recipe, "think")
    shown = load_dataset("digits").train[0]
    group = tuning.encode(shown)
    tokenizer = tuning.policy.processor.tokenizer
    assert said(tuning, shown) == f"<think>{shown.thought}</think><answer>{shown.truth.text}</answer><|im_end|>"
    image = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
    assert tokenizer.decode(group.prompt.token_ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\nvisible: {image} infrared: {image} Which digit?<|im_end|>\n<|im_start|>assistant\n"
    )
    everything = torch.tensor([[*group.prompt.token_ids, *group.completions[0]]])
    with torch.no_grad():
        logits = tuning.policy.model(
            input_ids=everything,
            mm_token_type_ids=(everything == tuning.policy.layout.image_token_id).int(),
            pixel_values=group.prompt.pixel_values,
            image_grid_thw=group.prompt.grid_thw,
        ).logits[0]
    start = len(group.prompt.token_ids)
    by_hand = torch.nn.functional.cross_entropy(logits[start - 1 : -1], everything[0, start:])
    assert tuning.step([shown], 1) == pytest.approx(by_hand.item(), abs=1e-4)


def test_microbatches_add_up_to_the_mean_over_all_tokens(recipe: Recipe) -> None:
    samples = [load_dataset("digits").train[0], sample(thought="a long chain of many more tokens")]
    one_batch = recipe.model_copy(update={"train": recipe.train.model_copy(update={"tokens_per_microbatch": 1 << 16})})
    whole, parts = (FineTuning(item, "think") for item in (one_batch, recipe))
    assert parts.step(samples, 1) == pytest.approx(whole.step(samples, 1), abs=1e-5)
    for first, second in zip(whole.policy.model.parameters(), parts.policy.model.parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("frame", "box"),
    [
        (FrameKind.RESIZED, "[11, 20, 56, 78]"),  # 112 x 196 of 100 x 200: x * 1.12, y * 0.98
        (FrameKind.PER_MILLE, "[100, 100, 500, 400]"),  # x * 10, y * 5
        (FrameKind.ORIGINAL, "[10, 20, 50, 80]"),
    ],
)
def test_boxes_are_written_in_the_frame_of_the_model(recipe: Recipe, frame: FrameKind, box: str) -> None:
    tuning = FineTuning(with_model(recipe, box_frame=frame), "answer")
    fenced = f'```json\n[{{"bbox_2d": {box}}}]\n```'
    assert said(tuning, sample(truth=BOXES)) == f"<answer>{fenced}</answer><|im_end|>"


def test_answers_alone_need_no_chain_and_show_the_first_alternative(recipe: Recipe) -> None:
    shown = sample(truth=TextTruth(text="two or 2"), thought=None)
    assert said(FineTuning(recipe, "answer"), shown) == "<answer>two</answer><|im_end|>"
    assert first_alternative("orange and white or white and orange") == "orange and white"
    assert first_alternative("or") == "or" and first_alternative("Oregon  Corn") == "Oregon  Corn"


@pytest.mark.parametrize("thought", [None, " \n"])
def test_a_missing_chain_is_refused_with_the_name_of_the_sample(recipe: Recipe, thought: str | None) -> None:
    with pytest.raises(InputError, match=r"sample rows.jsonl line 3: no chain of thought"):
        FineTuning(recipe, "think").encode(sample(thought=thought))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"thought": "so</think><answer>1"}, "thought: contains '</think>'"),
        ({"truth": TextTruth(text="7<|im_end|>")}, "answer: contains '<|im_end|>'"),
        ({"question": "Which <|image_pad|>?"}, "question: contains '<|image_pad|>'"),
    ],
)
def test_texts_that_would_be_read_as_structure_are_refused(recipe: Recipe, more: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        FineTuning(recipe, "think").encode(sample(**more))
    assert f"sample rows.jsonl line 3: {message}" in str(error.value)


def test_a_sample_that_exceeds_the_context_is_refused(recipe: Recipe) -> None:
    with pytest.raises(TooLongError, match=r"rows.jsonl line 3: \d+ tokens .* at most 64"):
        FineTuning(with_model(recipe, max_model_len=64), "think").encode(sample())


def test_nothing_is_overwritten(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is the model that would be trained"):
        sft(recipe, recipe.model.path, print)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for name in ("full", "full/notes.txt"):
        with pytest.raises(ConfigError, match="exists and is not empty"):
            sft(recipe, tmp_path / name, print)


def test_a_folder_that_cannot_be_written_whole_does_not_appear(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("mars_trainer.model_writer.shutil.copyfile", full)
    with pytest.raises(OSError, match="no space"):
        sft(small(recipe, recipe.model.path, steps=1), tmp_path / "out", lambda line: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


def test_the_command_takes_a_recipe_or_makes_the_tiny_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, ...]] = []
    monkeypatch.setattr(cli, "_module", lambda *parts: started.append(parts))
    for line in ("sft r.toml --out x --target answer", "sft --out x --stop-after 3", "sft --out x"):
        assert CliRunner().invoke(cli.app, line.split()).exit_code == 0
    assert started == [
        ("mars_trainer.sft", "r.toml", "--out", "x", "--target", "answer"),
        ("mars_trainer.warm_start", "--out", "x", "--stop-after", "3"),
        ("mars_trainer.warm_start", "--out", "x"),
    ]
    for line in ("sft r.toml --out x --seed 1", "sft --out x --target think"):
        assert isinstance(CliRunner().invoke(cli.app, line.split()).exception, ConfigError)


@pytest.mark.parametrize(
    ("answer", "stated", "expected"),
    [
        ("<think>A cup.</think>\n<answer> B </answer>", None, ("A cup.", "B")),
        ("<answer>B</answer>", "A cup.", ("A cup.", "B")),
        ("<think> </think><answer>B</answer>", None, (None, "B")),
        ("B < C", " ", (None, "B < C")),
        ([[1, 2, 3, 4]], "A cup.", ("A cup.", [[1, 2, 3, 4]])),
    ],
)
def test_a_reasoned_answer_is_split(answer: Any, stated: str | None, expected: tuple[str | None, Any]) -> None:
    assert split_thought(answer, "row 0: answer", stated) == expected


@pytest.mark.parametrize(
    ("answer", "stated"),
    [
        ("<think>A cup.</think>B", None),
        ("<think>A</think><answer>B</answer><answer>C</answer>", None),
        ("<think>A</think><answer> </answer>", None),
        ("<think>A</think><answer>B</answer>", "another chain"),
    ],
)
def test_other_uses_of_the_tags_are_faults(answer: str, stated: str | None) -> None:
    with pytest.raises(InputError, match="row 0: answer: "):
        split_thought(answer, "row 0: answer", stated)


@pytest.mark.parametrize("name", ["digits", "scene"])
def test_chains_of_the_built_in_datasets_name_the_source_that_holds_the_answer(name: str) -> None:
    wanted = {
        "only-visible": "visible is clear",
        "visible-misled": "visible is clear",
        "only-infrared": "infrared is clear",
        "infrared-misled": "infrared is clear",
        "both": "both is clear",
    }
    dataset = load_dataset(name)
    samples = [dataset.train[index] for index in range(24)]
    assert {item.meta["kind"] for item in samples} == set(wanted)
    assert all(item.thought == wanted[item.meta["kind"]] for item in samples)
    alone = dataset.warmup[0]
    assert alone.thought == f"{next(iter(alone.images))} is clear"
