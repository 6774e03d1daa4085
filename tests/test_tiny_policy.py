"""The tiny policy's tokenizer, processor and committed folder."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from mars_shared.contracts import BoxesTruth, TextTruth, View
from mars_shared.messages import build_messages
from mars_shared.settings import DatasetName
from mars_trainer.batching import TokenLayout, expand_placeholders, pixels
from mars_trainer.datasets import load_dataset
from mars_trainer.datasets.base import PAIR
from mars_trainer.model import Policy, load_policy
from mars_trainer.tiny import SPECIAL_TOKENS, build_tokenizer, write_tiny
from mars_trainer.warm_start import Demonstration, WarmStartConfig, answer_text, demonstrate, encode, warm_start

COMMITTED = Path(__file__).parents[1] / "models" / "tiny"
BOXES = '[{"bbox_2d": [12, 40, 60, 100]}, {"bbox_2d": [0, 7, 9, 112]}]'
ANSWER = f"<think>visible is clear</think><answer>```json\n{BOXES}\n```</answer>"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    path = tmp_path_factory.mktemp("random-policy")
    write_tiny(path, seed=0)
    return load_policy(path)


_TOKENIZER = build_tokenizer()


@given(st.text())
@settings(max_examples=300, deadline=None)
@example("  leading and trailing  \n\n\t")
@example("don't , . ? ! [1, 2,3 ,4]")
@example("naïve 日本語 🙂 \u0000 \u200d e\u0301")
@example("<0x41> <|im_end|> <|image_pad|>x")
@example("0012 449 99999 ½ ²")
def test_any_text_survives_encoding_and_decoding(text: str) -> None:
    assert _TOKENIZER.decode(_TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


@given(st.lists(st.integers(0, 448), min_size=4, max_size=4))
@settings(max_examples=50, deadline=None)
def test_every_number_of_a_box_is_one_token(box: list[int]) -> None:
    tokens = [_TOKENIZER.decode([i]) for i in _TOKENIZER.encode(f'{{"bbox_2d": {json.dumps(box)}}}').ids]
    assert tokens == ['{"bbox_2d": [', str(box[0]), ", ", str(box[1]), ", ", str(box[2]), ", ", str(box[3]), "]}"]


def test_template_words_are_single_tokens_and_not_special(policy: Policy) -> None:
    tokenizer = policy.processor.tokenizer
    ids = tokenizer(ANSWER + "<|im_end|>")["input_ids"]
    pieces = [tokenizer.decode([i]) for i in ids[:7]]
    assert pieces == ["<think>", "visible", " is clear", "</think>", "<answer>", "```json\n", "["]
    assert len(ids) == 30 and ids[-1] == tokenizer.eos_token_id == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == ANSWER


def test_special_tokens_have_the_ids_that_the_configuration_names(policy: Policy) -> None:
    config, tokenizer = policy.model.config, policy.processor.tokenizer
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(7))
    assert (config.vision_start_token_id, config.vision_end_token_id) == (3, 4)
    assert (config.image_token_id, config.video_token_id) == (5, 6)
    assert len(tokenizer) == config.text_config.vocab_size


def test_the_chat_template_renders_sources_and_plain_strings(policy: Policy) -> None:
    render = policy.processor.apply_chat_template
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    multi = render(build_messages("Which digit?", PAIR), add_generation_prompt=True, tokenize=False)
    assert multi == (
        f"{system}<|im_start|>user\nvisible: {image} infrared: {image} Which digit?<|im_end|>\n<|im_start|>assistant\n"
    )
    mono = render(build_messages("Which digit?", PAIR, only="infrared"), add_generation_prompt=True, tokenize=False)
    assert mono == f"{system}<|im_start|>user\ninfrared: {image} Which digit?<|im_end|>\n<|im_start|>assistant\n"
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi "}]
    chat += [{"role": "assistant", "content": "7"}]
    assert render(chat, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n7<|im_end|>\n"
    )


@pytest.mark.parametrize(("size", "grid"), [((56, 56), [1, 4, 4]), ((112, 112), [1, 8, 8]), ((4000, 1000), [1, 16, 64])])
def test_images_become_multiples_of_28_within_the_pixel_limits(policy: Policy, size: tuple[int, int], grid: list[int]) -> None:
    pixel_values, grid_thw = pixels(policy.processor, [Image.new("RGB", size, (128, 128, 128))])
    assert grid_thw.tolist() == [grid]
    assert pixel_values.shape == (grid[1] * grid[2], 3 * 2 * 14 * 14)
    torch.testing.assert_close(pixel_values, torch.full_like(pixel_values, (128 / 255 - 0.5) / 0.25))


def test_placeholders_are_expanded_by_merged_patches_as_the_processor_does(policy: Policy) -> None:
    images = [Image.new("RGB", size) for size in ((56, 56), (84, 112))]
    text = policy.processor.apply_chat_template(build_messages("Which digit?", PAIR), add_generation_prompt=True, tokenize=False)
    by_processor = policy.processor(text=[text], images=images, return_tensors="pt")["input_ids"][0].tolist()
    _, grid_thw = pixels(policy.processor, images)
    expanded = expand_placeholders(policy.processor.tokenizer(text)["input_ids"], grid_thw, policy.layout)
    assert list(expanded) == by_processor
    assert expanded.count(policy.layout.image_token_id) == 4 + 12


def test_a_placeholder_without_an_image_stays_one_token() -> None:
    layout = TokenLayout(image_token_id=5, pad_token_id=0, merge_size=2)
    assert expand_placeholders([9, 5, 5], torch.tensor([[1, 4, 4]]), layout) == (9, 5, 5, 5, 5, 5)


def test_answers_are_written_in_the_frame_of_the_resized_image() -> None:
    truth = BoxesTruth(boxes=((10, 20, 50, 80),), width_px=100, height_px=200)
    text = answer_text("both", truth, frame=(112, 196))  # x * 1.12, y * 0.98
    assert text == '<think>both is clear</think><answer>```json\n[{"bbox_2d": [11, 20, 56, 78]}]\n```</answer>'
    assert answer_text("visible", TextTruth(text="7"), (56, 56)) == "<think>visible is clear</think><answer>7</answer>"


@pytest.mark.parametrize(
    ("only", "view", "images"), [(None, View.SINGLE, 2), ("visible", View.SINGLE, 1), ("visible", View.REPEAT, 2)]
)
def test_a_demonstration_shows_the_images_of_its_view(policy: Policy, only: str | None, view: View, images: int) -> None:
    sample = load_dataset("digits").train[0]
    group = encode(Demonstration(sample, PAIR, only, view, "visible", sample.truth), policy)
    assert group.prompt.grid_thw.tolist() == [[1, 4, 4]] * images
    assert group.prompt.token_ids.count(policy.layout.image_token_id) == 4 * images
    if view is View.REPEAT:
        assert torch.equal(group.prompt.pixel_values[:16], group.prompt.pixel_values[16:])


def test_pairs_are_answered_with_mixed_worth_and_single_sources_rightly(tmp_path: Path) -> None:
    demos = demonstrate(load_dataset(DatasetName.DIGITS), 200, WarmStartConfig(tmp_path), np.random.default_rng(0))
    pairs, singles = ([d for d in demos if (d.only is None) is multi] for multi in (True, False))
    assert all(d.truth == d.sample.truth and d.thought == d.only for d in singles)
    assert {d.view for d in singles} == {View.SINGLE, View.REPEAT}
    # A pair is right with 0.6, else it has another sample's answer, which is the same digit once in ten.
    assert 0.4 < sum(d.truth == d.sample.truth for d in pairs) / len(pairs) < 0.9
    assert {d.thought for d in pairs} == {*PAIR, "both"}


def test_the_warm_start_lowers_its_loss_and_gives_the_same_weights_again(tmp_path: Path) -> None:
    lines: list[str] = []
    samples = ((DatasetName.DIGITS, 4), (DatasetName.SCENE, 2))
    folders = [
        warm_start(WarmStartConfig(tmp_path / name, steps=3, samples=samples, warmup_steps=1), lines.append)
        for name in ("one", "two")
    ]
    first, second = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert first == second
    digits, scene = re.fullmatch(r"warm start: step 3 of 3, loss digits (.+), scene (.+), \d+ s", lines[0]).groups()
    assert float(digits) < math.log(734) and float(scene) < math.log(734)  # what a uniform policy has


def test_the_committed_policy_is_whole_small_and_loads() -> None:
    assert sum(file.stat().st_size for file in COMMITTED.rglob("*")) <= 8 * 2**20
    committed = load_policy(COMMITTED)
    count = sum(parameter.numel() for parameter in committed.model.parameters())
    assert 1_000_000 <= count <= 2_000_000
    assert json.loads((COMMITTED / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_committed_tokenizer_and_template_are_those_of_the_code(tmp_path: Path) -> None:
    write_tiny(tmp_path, seed=0)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
        assert (COMMITTED / name).read_text() == (tmp_path / name).read_text(), name


def test_the_tokenizer_alone_loads_as_a_fast_tokenizer(policy: Policy) -> None:
    path = policy.processor.tokenizer.name_or_path
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    assert tokenizer.is_fast and tokenizer.chat_template == AutoProcessor.from_pretrained(path).chat_template
