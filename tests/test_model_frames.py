"""The frame of boxes is the model family's unless the recipe sets it, and reaches the score."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from builders import V0, image_bytes
from mars_reward.registry import score
from mars_rollout.adhoc import AdhocPrompts, GroupRequest
from mars_rollout.render import PromptRenderer
from mars_shared.blobs import BlobStore
from mars_shared.contracts import BoxesTruth, FrameKind, Prompt, ScoreItem
from mars_shared.errors import ConfigError
from mars_shared.frames import box_frame_of, resolved_box_frame
from mars_shared.settings import Recipe
from mars_trainer.datasets.base import Sample
from mars_trainer.dispatch import PromptMaker

FAMILIES = [
    ("qwen2_vl", FrameKind.PER_MILLE),
    ("qwen2_5_vl", FrameKind.RESIZED),
    ("qwen3_vl", FrameKind.PER_MILLE),
    ("qwen3_vl_moe", FrameKind.PER_MILLE),
]


def make_recipe(folder: Path, family: str, box_frame: FrameKind | None = None) -> Recipe:
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    return Recipe.model_validate(
        {
            "run": {"name": "r", "dir": folder},
            "model": {"path": folder, "max_model_len": 256, "box_frame": box_frame},
            "data": {"dataset": "scene"},
            "rollout": {"num_generations": 2, "max_completion_length": 8},
            "train": {"steps": 1, "prompts_per_step": 1, "learning_rate": 1e-3},
        }
    )


def training_prompt(recipe: Recipe, truth: BoxesTruth) -> Prompt:
    image = image_bytes((truth.width_px, truth.height_px))
    sample = Sample(prompt_id="p", question="Where is the person?", images={"visible": image}, truth=truth)
    maker = PromptMaker(recipe, BlobStore(recipe.run.dir / "blobs"))
    return maker.training(sample, epoch=0, dispatch_index=0, version=V0)


@pytest.mark.parametrize(("family", "frame"), FAMILIES)
def test_each_family_has_its_frame(family: str, frame: FrameKind, tmp_path: Path) -> None:
    assert box_frame_of(family) is frame
    assert resolved_box_frame(make_recipe(tmp_path, family).model) is frame


def test_an_unknown_family_is_an_error_that_names_it_the_known_ones_and_the_setting(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, "llava_next")
    message = (
        "'llava_next'.*unknown.*qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe.*model.box_frame to original, resized, per_mille"
    )
    for build in (PromptMaker, AdhocPrompts):
        with pytest.raises(ConfigError, match=message):
            build(recipe, BlobStore(tmp_path / "blobs"))


def test_a_folder_without_a_model_is_an_error_and_not_a_frame(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, "qwen2_5_vl")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=f"{tmp_path}: config.json cannot be read"):
        resolved_box_frame(recipe.model)


def test_a_set_frame_wins_over_an_unknown_family(tmp_path: Path) -> None:
    assert resolved_box_frame(make_recipe(tmp_path, "llava_next", FrameKind.ORIGINAL).model) is FrameKind.ORIGINAL


@pytest.mark.parametrize(("chosen", "warnings"), [(FrameKind.PER_MILLE, 1), (FrameKind.RESIZED, 0)])
def test_a_set_frame_wins_over_the_family_and_a_contradiction_is_logged(
    chosen: FrameKind, warnings: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert resolved_box_frame(make_recipe(tmp_path, "qwen2_5_vl", chosen).model) is chosen
    assert len(caplog.records) == warnings
    assert all("model.box_frame is per_mille; models of family qwen2_5_vl write resized" in m for m in caplog.messages)


@pytest.mark.parametrize(
    ("family", "box"),
    # The truth is the right half between a quarter and three quarters of the height of 100 x 60 pixels,
    # which smart_resize makes 112 x 56.
    [("qwen2_5_vl", [56, 14, 112, 42]), ("qwen3_vl", [500, 250, 1000, 750])],
)
def test_a_perfect_answer_in_the_familys_frame_scores_1_from_recipe_to_reward(
    family: str, box: list[int], tmp_path: Path, renderer: PromptRenderer
) -> None:
    truth = BoxesTruth(boxes=((50, 15, 100, 45),), width_px=100, height_px=60)
    prompt = training_prompt(make_recipe(tmp_path, family), truth)
    view = renderer.views(prompt, {"visible": (100, 60)})[0]
    completion = f'<think>r</think><answer>```json\n[{{"bbox_2d": {box}}}]\n```</answer>'
    parts = score(ScoreItem(completion=completion, truth=truth, frame=view.frame), "paper").parts
    assert parts == {"format": 0.75, "iou": pytest.approx(1.0, abs=1e-12)}


def test_an_adhoc_prompt_has_the_familys_frame(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path / "blobs")
    request = GroupRequest.model_validate(
        {"question": "Where?", "sources": [{"name": "visible", "image": blobs.put(image_bytes())}]}
    )
    assert AdhocPrompts(make_recipe(tmp_path, "qwen3_vl"), blobs).prompt(request).box_frame is FrameKind.PER_MILLE
