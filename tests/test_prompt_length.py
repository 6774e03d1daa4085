"""A prompt's length is that of its rendered text with every image placeholder expanded."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoTokenizer

from builders import image_bytes
from mars_rollout.render import ImageGeometry, PromptRenderer
from mars_shared.errors import ImageError, InputError
from mars_shared.messages import build_messages
from mars_trainer.batching import TokenLayout, expand_placeholders, pixels
from mars_trainer.data import main
from mars_trainer.datasets.prompt_length import PromptRuler
from mars_trainer.datasets.records import NamedPath, Record

TEXT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "visible: <|vision_start|><|image_pad|><|vision_end|> infrared: <|vision_start|><|image_pad|><|vision_end|> Which digit?"
    "<|im_end|>\n<|im_start|>assistant\n"
)
"""The prompt written out by hand, as the tiny model's template puts it."""


def record(question: str = "Which digit?") -> Record:
    images = tuple(NamedPath(name, Path(f"{name}.png")) for name in ("visible", "infrared"))
    return Record("questions.jsonl line 1", "1", question, images, "7")


@pytest.fixture(scope="module")
def tiny(root: Path) -> Path:
    return root / "models" / "tiny"


@pytest.fixture(scope="module")
def ruler(tiny: Path) -> PromptRuler:
    return PromptRuler(tiny)


def test_the_length_is_the_text_and_one_token_for_28_px_squares_of_each_image(tiny: Path, ruler: PromptRuler) -> None:
    text = len(AutoTokenizer.from_pretrained(tiny)(TEXT, add_special_tokens=False)["input_ids"])
    # 56 x 56 are 2 x 2 squares; 100 x 60 is resized to 112 x 56, 4 x 2 squares. Two placeholders were there before.
    assert ruler(record(), [(56, 56), (100, 60)]) == text - 2 + 4 + 8


def test_it_is_what_the_trainer_batches_and_a_replica_renders(tiny: Path, ruler: PromptRuler) -> None:
    from transformers import AutoProcessor

    sizes = [(140, 60), (30, 200)]
    processor = AutoProcessor.from_pretrained(tiny)
    renderer = PromptRenderer(tiny, max_model_len=4096)
    ids = renderer.token_ids(build_messages("Which digit?", ["visible", "infrared"]))
    _, grid = pixels(processor, [Image.open(io.BytesIO(image_bytes(size))) for size in sizes])
    layout = TokenLayout(json.loads((tiny / "config.json").read_text())["image_token_id"], 0, 2)
    expanded = expand_placeholders(ids, grid, layout)
    geometry = ImageGeometry(processor.image_processor)
    assert ruler(record(), sizes) == len(expanded) == len(ids) - 2 + sum(geometry.token_count(s, what="") for s in sizes)


def test_special_tokens_and_impossible_shapes_are_refused_by_name(ruler: PromptRuler) -> None:
    with pytest.raises(InputError, match="questions.jsonl line 1: the question contains .*<|image_pad|>"):
        ruler(record("Which <|image_pad|>?"), [(56, 56)] * 2)
    with pytest.raises(ImageError, match="line 1: source 'infrared': 3000 x 10 pixels cannot be resized"):
        ruler(record(), [(56, 56), (3000, 10)])


def test_a_prompt_that_does_not_fit_is_a_fault(
    tmp_path: Path, tiny: Path, ruler: PromptRuler, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("visible", "infrared")
    for name in names:
        (tmp_path / f"{name}.png").write_bytes(image_bytes((56, 56)))
    short, long, special = "Which digit?", "Which digit? " * 30, "Which <|im_end|>?"
    sources = [{"name": name, "image": f"{name}.png"} for name in names]
    lines = [{"id": q, "question": q, "answer": "7", "sources": sources} for q in (short, long, special)]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    fits = ruler(record(), [(56, 56)] * 2)
    longest = ruler(record(long), [(56, 56)] * 2)
    command = ["check", str(path), "--model", str(tiny), "--max-prompt-length"]
    assert main([*command, str(fits)]) == 3
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{path} line 2: the prompt has {longest} tokens; expected at most {fits}"
    assert said[1].startswith(f"{path} line 3: the question contains") and "1 without a fault" in said[2]
    assert main([*command, str(fits - 1)]) == 3
    assert f"line 1: the prompt has {fits} tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "models/tiny"], "--model was given without --max-prompt-length"),
        (["--max-prompt-length", "100"], "--max-prompt-length was given without --model"),
        (["--model", "gone", "--max-prompt-length", "100"], "model folder gone: no such folder"),
    ],
)
def test_a_length_needs_its_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    (tmp_path / "questions.jsonl").write_text("")
    assert main(["check", str(tmp_path / "questions.jsonl"), *options]) == 2
    assert message in capsys.readouterr().err
