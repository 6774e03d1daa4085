"""A prompt becomes token ids: views, placeholders, lengths, box frames, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mars_rollout.render import PromptRenderer
from mars_shared.contracts import BoxFrame, FrameKind, View
from mars_shared.errors import ConfigError, ImageError, InputError, TooLongError
from rollout_fixtures import MAX_MODEL_LEN, RunFolder, make_prompt

SIZES = {"visible": (56, 56), "infrared": (112, 84)}
IMAGE_TOKEN = 5


def test_the_multi_source_view_has_every_source_and_each_mono_view_its_own(
    renderer: PromptRenderer, run_folder: RunFolder
) -> None:
    multi, visible, infrared = renderer.views(make_prompt(run_folder.blobs), SIZES)
    assert [multi.source, visible.source, infrared.source] == [None, "visible", "infrared"]
    assert [multi.images, visible.images, infrared.images] == [("visible", "infrared"), ("visible",), ("infrared",)]
    assert [v.token_ids.count(IMAGE_TOKEN) for v in (multi, visible, infrared)] == [2, 1, 1]
    # 56 x 56 are 2 x 2 tokens of 28 x 28 pixels, 112 x 84 are 4 x 3.
    assert multi.expanded_length == len(multi.token_ids) - 2 + 4 + 12
    assert infrared.expanded_length == len(infrared.token_ids) - 1 + 12


def test_the_repeat_view_keeps_the_text_and_shows_one_image_twice(renderer: PromptRenderer, run_folder: RunFolder) -> None:
    prompt = make_prompt(run_folder.blobs)
    prompt = prompt.model_copy(update={"sampling": prompt.sampling.model_copy(update={"mono_view": View.REPEAT})})
    multi, visible, infrared = renderer.views(prompt, SIZES)
    assert visible.token_ids == infrared.token_ids == multi.token_ids
    assert [visible.images, infrared.images] == [("visible", "visible"), ("infrared", "infrared")]


def test_without_mono_completions_there_is_one_view(renderer: PromptRenderer, run_folder: RunFolder) -> None:
    prompt = make_prompt(run_folder.blobs)
    prompt = prompt.model_copy(update={"sampling": prompt.sampling.model_copy(update={"num_mono": 0})})
    assert [view.source for view in renderer.views(prompt, SIZES)] == [None]


@pytest.mark.parametrize(
    ("kind", "size_px", "expected"),
    [
        # 100 x 60 rounds to 112 x 56, multiples of 28.
        (FrameKind.RESIZED, (100, 60), (112, 56)),
        (FrameKind.ORIGINAL, (100, 60), (100, 60)),
        (FrameKind.PER_MILLE, (100, 60), (1000, 1000)),
    ],
)
def test_boxes_are_in_the_frame_of_the_first_image_shown(
    kind: FrameKind, size_px: tuple[int, int], expected: tuple[int, int], renderer: PromptRenderer, run_folder: RunFolder
) -> None:
    multi, visible, infrared = renderer.views(
        make_prompt(run_folder.blobs, box_frame=kind), {"visible": size_px, "infrared": (56, 56)}
    )
    frame = BoxFrame(kind=kind, width=expected[0], height=expected[1])
    assert multi.frame == visible.frame == frame
    assert infrared.frame == (frame if kind is FrameKind.PER_MILLE else BoxFrame(kind=kind, width=56, height=56))


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_end|>", "<|vision_start|>"])
def test_a_question_with_a_special_token_is_refused_by_name(token: str, renderer: PromptRenderer, run_folder: RunFolder) -> None:
    with pytest.raises(InputError, match="prompt sample-1: the question contains .*" + token.strip("<|>")):
        renderer.views(make_prompt(run_folder.blobs, question=f"Which {token} digit?"), SIZES)


def test_template_words_that_are_not_special_may_be_asked(renderer: PromptRenderer, run_folder: RunFolder) -> None:
    assert renderer.views(make_prompt(run_folder.blobs, question="Answer in <think></think><answer></answer>."), SIZES)


def test_a_prompt_that_fills_the_context_exactly_fits_and_one_more_token_does_not(
    renderer: PromptRenderer, run_folder: RunFolder
) -> None:
    prompt = make_prompt(run_folder.blobs)
    length = max(view.expanded_length for view in renderer.views(prompt, SIZES))

    def asking(tokens: int) -> object:
        sampling = prompt.sampling.model_copy(update={"max_completion_length": tokens})
        return renderer.views(prompt.model_copy(update={"sampling": sampling}), SIZES)

    assert asking(MAX_MODEL_LEN - length)
    with pytest.raises(
        TooLongError, match=rf"has {length} tokens .* is {MAX_MODEL_LEN - length + 1}; expected at most {MAX_MODEL_LEN}"
    ):
        asking(MAX_MODEL_LEN - length + 1)


def test_an_image_shape_that_the_processor_refuses_is_named(renderer: PromptRenderer, run_folder: RunFolder) -> None:
    with pytest.raises(ImageError, match="prompt sample-1, source 'infrared': 2000 x 4 pixels"):
        renderer.views(make_prompt(run_folder.blobs), {"visible": (56, 56), "infrared": (2000, 4)})


@pytest.mark.parametrize("missing", ["tokenizer.json", "chat_template.jinja", "preprocessor_config.json"])
def test_a_model_folder_without_its_parts_is_refused(missing: str, model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    (folder / missing).unlink()
    with pytest.raises(ConfigError, match=str(folder)):
        PromptRenderer(folder, MAX_MODEL_LEN)
