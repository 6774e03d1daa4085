"""Batching and the log-probabilities of completions, against naive computations of the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from mars_shared.errors import CheckpointError, ConfigError, InputError
from mars_trainer.batching import (
    EncodedGroup,
    EncodedPrompt,
    Microbatch,
    TokenLayout,
    make_microbatches,
    pixels,
    rotary_positions,
)
from mars_trainer.model import Policy, completion_logprobs, completion_statistics, load_policy
from mars_trainer.tiny import save_policy, write_tiny

IMAGE, VIDEO, EOS, PAD = 5, 6, 2, 0
LAYOUT = TokenLayout(image_token_id=IMAGE, pad_token_id=PAD, merge_size=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random-policy")
    write_tiny(path, seed=3)
    return path


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    torch.set_num_threads(1)
    return load_policy(folder)


def _image(width: int, height: int, seed: int) -> Image.Image:
    noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.numpy(), "RGB")


def _prompt(policy: Policy, name: str, sizes: list[tuple[int, int]], seed: int) -> EncodedPrompt:
    """Text, then every image between its markers, then text."""
    pixel_values, grid_thw = pixels(policy.processor, [_image(*size, seed + k) for k, size in enumerate(sizes)])
    ids = [1, 40, 41]
    for grid in grid_thw:
        ids += [3, *[IMAGE] * (int(grid.prod()) // 4), 4, 50]
    return EncodedPrompt(name, (*ids, 60, 61), pixel_values, grid_thw)


def _groups(policy: Policy) -> list[EncodedGroup]:
    """Two groups of different shapes; completions of different lengths, some with placeholder tokens."""
    pair = _prompt(policy, "pair", [(56, 56), (112, 84)], seed=1)
    single = _prompt(policy, "single", [(84, 56)], seed=9)
    return [
        EncodedGroup(pair, ((70, 71, EOS), (IMAGE, 72, VIDEO, IMAGE, IMAGE, EOS))),
        EncodedGroup(single, ((80, EOS), (81, 82, 83, 84))),
    ]


def _naive_logprobs(policy: Policy, group: EncodedGroup, index: int, temperature: float) -> Tensor:
    """transformers' own forward pass of one unpadded row with all logits; a completion's placeholders
    get embeddings of their own, so each is looked up as text."""
    prompt, completion = group.prompt, group.completions[index]
    ids = torch.tensor([[*prompt.token_ids, *completion]])
    kinds = torch.tensor([[int(t == IMAGE) for t in prompt.token_ids] + [0] * len(completion)], dtype=torch.int)
    positions, _ = policy.model.model.get_rope_index(ids, kinds, prompt.grid_thw)
    embeddings = policy.model.get_input_embeddings()(ids).clone()
    features = policy.model.model.visual(prompt.pixel_values, grid_thw=prompt.grid_thw).pooler_output
    embeddings[0, kinds[0].bool()] = features
    logits = policy.model(inputs_embeds=embeddings, position_ids=positions).logits[0].float() / temperature
    predicted = logits[len(prompt.token_ids) - 1 : -1].log_softmax(-1)
    return predicted[torch.arange(len(completion)), torch.tensor(completion)]


def _by_row(batch: Microbatch, values: Tensor) -> dict[tuple[int, int], Tensor]:
    return {row: values[k][batch.completion_mask[k]] for k, row in enumerate(batch.rows)}


@pytest.mark.parametrize("limit", [1 << 20, 1])
def test_logprobs_equal_a_naive_computation_placeholders_in_completions_included(policy: Policy, limit: int) -> None:
    groups = _groups(policy)
    found: dict[tuple[int, int], Tensor] = {}
    with torch.no_grad():
        for batch in make_microbatches(groups, policy.layout, limit):
            found |= _by_row(batch, completion_logprobs(policy.model, batch, 0.7, chunk_tokens=4))
        for (group, index), logprobs in found.items():
            torch.testing.assert_close(logprobs, _naive_logprobs(policy, groups[group], index, 0.7), atol=2e-6, rtol=0)
    assert sorted(found) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_the_image_matters_and_every_row_sees_its_own(policy: Policy) -> None:
    one, two = (EncodedGroup(_prompt(policy, "p", [(56, 56)], seed), ((70, 71, EOS),)) for seed in (1, 2))
    with torch.no_grad():
        (batch,) = make_microbatches([one, two, one], policy.layout, 1 << 20)
        rows = completion_logprobs(policy.model, batch, 1.0, 64)
    torch.testing.assert_close(rows[0], rows[2], atol=1e-6, rtol=0)
    assert (rows[0] - rows[1]).abs().max() > 1e-5


def test_chunked_equals_unchunked_in_value_entropy_and_gradient(policy: Policy) -> None:
    (batch,) = make_microbatches(_groups(policy), policy.layout, 1 << 20)
    results = []
    for chunk_tokens in (4, 1 << 20):
        policy.model.zero_grad()
        statistics = completion_statistics(policy.model, batch, 0.9, chunk_tokens)
        weights = torch.arange(statistics.logprobs.numel()).reshape(statistics.logprobs.shape)
        (statistics.logprobs * weights).sum().backward()
        gradients = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
        results.append((statistics, gradients))
    (chunked, chunked_gradients), (whole, whole_gradients) = results
    torch.testing.assert_close(chunked.logprobs, whole.logprobs, atol=1e-6, rtol=0)
    torch.testing.assert_close(chunked.entropy, whole.entropy, atol=1e-5, rtol=0)
    assert {name.split(".")[1] for name in whole_gradients} == {"visual", "language_model"}
    for name, gradient in whole_gradients.items():
        torch.testing.assert_close(chunked_gradients[name], gradient, atol=1e-4, rtol=1e-3)


def test_logits_never_exist_for_more_tokens_than_a_chunk(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    (batch,) = make_microbatches(_groups(policy), policy.layout, 1 << 20)
    vocabulary = policy.model.config.text_config.vocab_size
    seen: list[int] = []
    linear = torch.nn.functional.linear

    def spy(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.shape[0] == vocabulary:
            seen.append(states.shape[0])
        return linear(states, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    completion_logprobs(policy.model, batch, 1.0, chunk_tokens=4).sum().backward()
    assert sum(seen) == 2 * 15  # 3 + 6 + 2 + 4 tokens, forward and again backward
    assert max(seen) == 4


def test_logprobs_and_entropy_of_a_uniform_policy_are_those_of_its_vocabulary(folder: Path) -> None:
    uniform = load_policy(folder)
    torch.nn.init.zeros_(uniform.model.lm_head.weight)
    (batch,) = make_microbatches(_groups(uniform), uniform.layout, 1 << 20)
    with torch.no_grad():
        statistics = completion_statistics(uniform.model, batch, 1.0, 64)
    log_vocabulary = torch.tensor(float(uniform.model.config.text_config.vocab_size)).log()
    expected = torch.where(batch.completion_mask, log_vocabulary, torch.zeros(()))
    torch.testing.assert_close(statistics.logprobs, -expected)
    torch.testing.assert_close(statistics.entropy, expected)


def test_images_of_a_group_are_encoded_once_however_many_completions_it_has(policy: Policy) -> None:
    prompt = _prompt(policy, "p", [(56, 56), (56, 56)], seed=4)
    (batch,) = make_microbatches([EncodedGroup(prompt, tuple((n, EOS) for n in range(70, 84)))], policy.layout, 1 << 20)
    assert len(batch.rows) == 14 and batch.token_ids.shape == (1, len(prompt.token_ids) + 14 * 2)
    assert batch.grid_thw.tolist() == [[1, 4, 4], [1, 4, 4]] and batch.pixel_values.shape[0] == 32
    assert batch.feature_index.tolist() == list(range(8))


def test_rotary_positions_follow_the_image_grid_and_go_on_after_its_longest_side() -> None:
    # text 0 1, a grid of 2 x 3 merged patches from 2 on, text on from 2 + 3 = 5
    found = rotary_positions([1, 3, *[IMAGE] * 6, 4, 9], torch.tensor([[1, 4, 6]]), LAYOUT)
    assert found.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


def _text_groups(*lengths: list[int]) -> list[EncodedGroup]:
    """Groups of a 2-token prompt without images and completions of the given lengths."""
    nothing = torch.zeros((0, 1176)), torch.zeros((0, 3), dtype=torch.long)
    prompts = [EncodedPrompt(f"g{k}", (1, 9), *nothing) for k in range(len(lengths))]
    return [EncodedGroup(p, tuple((7,) * n for n in each)) for p, each in zip(prompts, lengths, strict=True)]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (100, [[(0, 0), (0, 1), (1, 0), (1, 1)]]),
        (15, [[(0, 0), (0, 1)], [(1, 0), (1, 1)]]),  # sequences of 5 and 8 tokens: two of 8 would be 16
        (7, [[(0, 0), (0, 1)], [(1, 0)], [(1, 1)]]),  # group 1 is over the limit and has to part
        (1, [[(0, 0)], [(0, 1)], [(1, 0)], [(1, 1)]]),
    ],
)
def test_microbatches_keep_groups_together_within_the_limit_and_order(limit: int, expected: list[list[tuple[int, int]]]) -> None:
    batches = make_microbatches(_text_groups([1, 2], [3, 3]), LAYOUT, limit)
    assert [list(batch.rows) for batch in batches] == expected


def test_completions_of_a_group_follow_its_prompt_and_padding_is_on_the_right() -> None:
    (batch,) = make_microbatches(_text_groups([1, 3], [2]), LAYOUT, 100)
    assert batch.token_ids.tolist() == [[1, 9, 7, 7, 7, 7], [1, 9, 7, 7, PAD, PAD]]
    assert batch.position_ids[0, 0].tolist() == [0, 1, 2, 2, 3, 4]  # each goes on from the prompt
    assert batch.completion_mask.tolist() == [[True, False, False], [True, True, True], [True, True, False]]
    assert batch.logit_sequence.tolist() == [0, 0, 1]
    assert [batch.logit_index[k][batch.completion_mask[k]].tolist() for k in range(3)] == [[1], [1, 3, 4], [1, 2]]


def test_a_completion_sees_its_prompt_and_itself_but_no_sibling() -> None:
    (batch,) = make_microbatches(_text_groups([1, 3]), LAYOUT, 100)
    assert batch.attention_mask is not None
    seen = [[k for k, visible in enumerate(row) if visible] for row in batch.attention_mask[0, 0].tolist()]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4], [0, 1, 3, 4, 5]]


def test_an_empty_completion_has_no_logprobs_and_disturbs_no_sibling(policy: Policy) -> None:
    (batch,) = make_microbatches(_text_groups([0, 2]), policy.layout, 100)
    logprobs = completion_logprobs(policy.model, batch, 1.0, 8)
    (alone,) = make_microbatches(_text_groups([2]), policy.layout, 100)
    assert logprobs[0].tolist() == [0.0, 0.0]
    torch.testing.assert_close(logprobs[1], completion_logprobs(policy.model, alone, 1.0, 8)[0])


def test_a_prompt_without_images_has_logprobs_too(policy: Policy) -> None:
    (batch,) = make_microbatches(_text_groups([2]), policy.layout, 100)
    assert completion_logprobs(policy.model, batch, 1.0, 8).shape == (1, 2)


def test_placeholders_that_do_not_match_the_images_name_the_prompt() -> None:
    prompt = EncodedPrompt("task-7", (1, IMAGE, IMAGE, 9), torch.zeros((16, 1176)), torch.tensor([[1, 4, 4]]))
    with pytest.raises(InputError, match=r"task-7: 2 image placeholder tokens .* expected 4 placeholders"):
        list(make_microbatches([EncodedGroup(prompt, ((7,),))], LAYOUT, 100))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors"])
def test_a_model_folder_without_a_needed_file_is_refused_by_its_name(folder: Path, tmp_path: Path, name: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / name).unlink()
    with pytest.raises(ConfigError, match="safetensors" if "safetensors" in name else name):
        load_policy(broken)


def test_a_missing_model_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        load_policy(tmp_path / "nowhere")


def test_another_architecture_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match="model_type is 'llama'; expected 'qwen2_5_vl'"):
        load_policy(other)


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 4), ("num_hidden_layers", 2), ("intermediate_size", 512)])
def test_weights_of_another_model_are_refused(folder: Path, tmp_path: Path, key: str, value: int) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    config["text_config"] |= {key: value, "layer_types": ["full_attention"] * 4} if key == "num_hidden_layers" else {key: value}
    config["text_config"]["layer_types"] = ["full_attention"] * config["text_config"]["num_hidden_layers"]
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="weights don't fit its config"):
        load_policy(other)


def test_a_saved_policy_is_the_same_in_bfloat16(policy: Policy, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    save_policy(policy.model, copy)
    again = load_policy(copy).model.state_dict()
    assert all(torch.equal(again[name], tensor.bfloat16().float()) for name, tensor in policy.model.state_dict().items())
