"""Contracts: frozen, strict, and groups whose members cannot be mixed up."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from builders import SOURCES, V0, make_completion, make_group, make_prompt, make_score, make_scored, make_views, sampling
from mars_shared.contracts import (
    BoxesTruth,
    Completion,
    Decoding,
    Kind,
    PolicyVersion,
    Prompt,
    RolloutGroup,
    SamplingSpec,
    Score,
    ScoredGroup,
    Source,
    VersionSpan,
    WeightFile,
    WeightIdentity,
    WeightManifest,
    expected_members,
    sampling_seed,
)

HASH = "ab" * 32


def changed(model: BaseModel, **updates: Any) -> Any:
    """The same message with some fields replaced, validated again."""
    return type(model).model_validate({**model.model_dump(), **updates})


def manifest(**updates: Any) -> WeightManifest:
    file = WeightFile(name="model.safetensors", size_bytes=3, blake3=HASH)
    values = {"run": "r", "version": V0, "model": "m", "dtype": "float32", "checksum": HASH, "kind": "snapshot", "files": (file,)}
    return WeightManifest(**values | updates)


def identity(**updates: Any) -> WeightIdentity:
    return WeightIdentity(**{"run": "r", "version": V0, "model": "m", "dtype": "float32", "checksum": HASH} | updates)


def test_a_message_survives_the_way_through_json() -> None:
    scored = make_scored(make_group(make_prompt()), [make_score(1), make_score(0), make_score(1), make_score(0)])
    assert ScoredGroup.model_validate_json(scored.model_dump_json()) == scored


def test_a_message_carries_its_schema_version_and_another_one_is_refused() -> None:
    message = json.loads(make_prompt().model_dump_json())
    assert message["schema_version"] == 1
    with pytest.raises(ValidationError, match="schema_version"):
        Prompt.model_validate(message | {"schema_version": 2})


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValidationError, match="temprature"):
        changed(sampling(), temprature=1.0)


def test_a_message_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make_prompt().question = "another"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_reward_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        Score(reward=value, parts={}, parsed=True)
    with pytest.raises(ValidationError, match="finite"):
        Score(reward=0.0, parts={"iou": value}, parsed=True)


def test_versions_are_ordered_by_incarnation_then_step() -> None:
    ordered = [PolicyVersion(incarnation=i, step=s) for i, s in ((1, 0), (1, 9), (2, 0), (2, 3))]
    assert sorted(ordered) == ordered
    assert ordered[1] < ordered[2] and ordered[2] > ordered[1] and ordered[0] <= ordered[0] and str(ordered[3]) == "2.3"


def test_a_prompt_without_sources_is_refused() -> None:
    with pytest.raises(ValidationError, match="sources"):
        make_prompt(sources=())


def test_a_source_name_given_twice_is_refused_and_named() -> None:
    with pytest.raises(ValidationError, match=r"\['visible', 'visible'\]; expected each name once"):
        make_prompt(sources=("visible", "visible"))


@pytest.mark.parametrize("name", ["", " visible", "a/b", "x" * 65, "<image>", "a\nb"])
def test_a_source_name_with_strange_characters_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="name"):
        Source(name=name, blob=HASH, media_type="image/png")


@pytest.mark.parametrize("blob", ["", "AB" * 32, "ab" * 31, "../" + "ab" * 30])
def test_a_source_that_names_no_hash_is_refused(blob: str) -> None:
    with pytest.raises(ValidationError, match="blob"):
        Source(name="visible", blob=blob, media_type="image/png")


def test_a_source_of_another_media_type_is_refused() -> None:
    with pytest.raises(ValidationError, match="media_type"):
        Source.model_validate({"name": "visible", "blob": HASH, "media_type": "image/gif"})


@pytest.mark.parametrize("box", [(10, 20, 10, 80), (10, 20, 40, 20), (40, 20, 10, 80), (10, 80, 40, 20)])
def test_a_box_without_area_is_refused_and_named(box: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError, match=r"box 1 is .*expected x1 < x2 and y1 < y2"):
        BoxesTruth.model_validate({"boxes": [(0, 0, 1, 1), box], "width_px": 112, "height_px": 112})


def test_boxes_without_a_box_are_refused() -> None:
    with pytest.raises(ValidationError, match="boxes"):
        BoxesTruth(boxes=(), width_px=1, height_px=1)


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ({"mono_decoding": Decoding.GREEDY, "num_mono": 2}, "num_mono is 2 with greedy"),
        ({"multi_decoding": Decoding.GREEDY, "num_generations": 2}, "num_generations is 2 with greedy"),
        ({"num_generations": 0}, "num_generations"),
        ({"num_mono": -1}, "num_mono"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": 0.0}, "top_p"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_sampling_spec_that_makes_no_sense_is_refused(updates: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        changed(sampling(num_generations=4), **updates)


def test_members_stand_multi_first_then_source_by_source() -> None:
    prompt = make_prompt(spec=sampling(num_generations=2, num_mono=2))
    assert list(expected_members(prompt)) == [
        (Kind.MULTI, None, 0),
        (Kind.MULTI, None, 1),
        (Kind.MONO, "visible", 0),
        (Kind.MONO, "visible", 1),
        (Kind.MONO, "infrared", 0),
        (Kind.MONO, "infrared", 1),
    ]


@given(generations=st.integers(1, 4), mono=st.integers(0, 3), order=st.randoms(use_true_random=False))
def test_only_the_canonical_order_of_members_makes_a_group(generations: int, mono: int, order: Any) -> None:
    prompt = make_prompt(spec=sampling(generations, mono))
    members = list(make_group(prompt).completions)
    shuffled = order.sample(members, len(members))
    if shuffled == members:
        return
    with pytest.raises(ValidationError, match="out of order"):
        make_group(prompt, shuffled)


def test_a_missing_and_an_extra_member_are_named() -> None:
    prompt = make_prompt()
    members = list(make_group(prompt).completions)
    with pytest.raises(ValidationError, match="missing .*infrared"):
        make_group(prompt, members[:-1])
    with pytest.raises(ValidationError, match="extra .*infrared"):
        make_group(prompt, [*members, make_completion(prompt.task_id, Kind.MONO, "infrared", 1)])


def test_a_completion_of_another_group_is_refused_and_named() -> None:
    prompt = make_prompt()
    members = list(make_group(prompt).completions)
    members[1] = make_completion("train-00000099", Kind.MULTI, None, 1)
    with pytest.raises(ValidationError, match=r"holds completions of \['train-00000099'\]"):
        make_group(prompt, members)


@pytest.mark.parametrize(("kind", "source"), [(Kind.MULTI, "visible"), (Kind.MONO, None)])
def test_kind_and_source_of_a_completion_agree(kind: Kind, source: str | None) -> None:
    with pytest.raises(ValidationError, match="only multi-source completions have none"):
        make_completion("g", kind, source, 0)


def test_every_token_has_a_logprob() -> None:
    completion = make_completion("g", Kind.MULTI, None, 0, tokens=3)
    with pytest.raises(ValidationError, match="3 token_ids but 2 logprobs"):
        changed(completion, logprobs=(-1.0, -1.0))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_logprob_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        changed(make_completion("g", Kind.MULTI, None, 0, tokens=1), logprobs=(value,))


@pytest.mark.parametrize("ranges", [[(0, 3)], [(0, 1), (1, 3)], [(0, 2), (2, 2), (2, 3)], []])
def test_version_spans_tile_the_tokens(ranges: list[tuple[int, int]]) -> None:
    spans = tuple(VersionSpan(version=V0, start=start, end=end) for start, end in ranges)
    completion = make_completion("t", Kind.MULTI, None, 0, tokens=3)
    assert Completion.model_validate(completion.model_dump() | {"spans": spans}).spans == spans


@pytest.mark.parametrize("ranges", [[(0, 2)], [(1, 3)], [(0, 1), (2, 3)], [(0, 2), (1, 3)], [(0, 4)], [(0, 4), (4, 3)]])
def test_version_spans_with_gap_or_overlap_are_refused(ranges: list[tuple[int, int]]) -> None:
    spans = tuple(VersionSpan(version=V0, start=start, end=end) for start, end in ranges)
    completion = make_completion("t", Kind.MULTI, None, 0, tokens=3)
    with pytest.raises(ValidationError, match=r"version spans are .*; expected them to tile 3 token_ids without a gap"):
        Completion.model_validate(completion.model_dump() | {"spans": spans})


def test_a_group_has_one_view_per_way_it_was_asked() -> None:
    prompt = make_prompt()
    group = make_group(prompt)
    assert group.view_of(None).images == SOURCES and group.view_of("visible").images == ("visible",)
    with pytest.raises(KeyError):
        group.view_of("depth")
    views = make_views(prompt)
    for wrong in (views[:-1], (*views, views[-1]), views[1:]):
        with pytest.raises(ValidationError, match="views are"):
            changed(group, views=wrong)


def test_without_mono_rollouts_there_is_the_multi_source_view_alone() -> None:
    group = make_group(make_prompt(spec=sampling(num_mono=0)))
    assert [view.source for view in group.views] == [None]
    with pytest.raises(ValidationError, match="views are"):
        changed(group, views=make_views(make_prompt()))


def test_a_scored_group_has_one_score_per_completion() -> None:
    with pytest.raises(ValidationError, match="3 scores for 4 completions"):
        make_scored(make_group(make_prompt()), [make_score(1)] * 3)


def test_rewards_are_told_apart_by_kind_and_source() -> None:
    scored = make_scored(make_group(make_prompt()), [make_score(r) for r in (0.1, 0.2, 0.3, 0.4)])
    assert scored.rewards(Kind.MULTI) == (0.1, 0.2)
    assert scored.rewards(Kind.MONO) == (0.3, 0.4)
    assert scored.rewards(Kind.MONO, "infrared") == (0.4,)
    assert scored.rewards(Kind.MONO, "depth") == ()


def test_seeds_are_the_same_on_every_machine() -> None:
    # printf '0\x1fdigits-1\x1f0\x1fmulti\x1f' | b2sum -l 32, halved; the other with '...mono\x1fvisible'.
    assert sampling_seed(0, "digits-1", 0, Kind.MULTI, None) == 671284924
    assert sampling_seed(0, "digits-1", 0, Kind.MONO, "visible") == 1738008923


def test_seeds_differ_by_run_prompt_epoch_kind_and_source() -> None:
    seeds = {
        sampling_seed(*arguments)
        for arguments in (
            (0, "p", 0, Kind.MULTI, None),
            (1, "p", 0, Kind.MULTI, None),
            (0, "q", 0, Kind.MULTI, None),
            (0, "p", 1, Kind.MULTI, None),
            (0, "p", 0, Kind.MONO, "visible"),
            (0, "p", 0, Kind.MONO, "infrared"),
        )
    }
    assert len(seeds) == 6


@given(run_seed=st.integers(0, 2**63), prompt_id=st.text(), epoch=st.integers(0, 10**6))
def test_seeds_have_31_bits(run_seed: int, prompt_id: str, epoch: int) -> None:
    assert 0 <= sampling_seed(run_seed, prompt_id, epoch, Kind.MULTI, None) < 2**31


def test_the_identity_of_weights_is_their_content() -> None:
    first, again = manifest(), WeightManifest.model_validate_json(manifest().model_dump_json())
    assert first.weights_id == again.weights_id
    changes = (manifest(version=PolicyVersion(incarnation=2, step=0)), manifest(model="n"), manifest(checksum="cd" * 32))
    assert len({first.weights_id, *(item.weights_id for item in changes)}) == 4


def test_the_same_weights_are_the_same_by_whichever_way_they_are_reached() -> None:
    base = identity(version=PolicyVersion(incarnation=1, step=3), checksum="cd" * 32)
    delta = manifest(kind="delta", base=base, files=(WeightFile(name="delta.mars", size_bytes=1, blake3="ef" * 32),))
    assert delta.weights_id == manifest().weights_id == identity().weights_id != base.weights_id
    assert delta.folder_name != manifest().folder_name


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "delta"},
        {"base": identity()},
        {"invertible": True},
        {"kind": "delta", "base": identity(model="n")},
        {"kind": "delta", "base": identity(dtype="bfloat16")},
    ],
    ids=["delta without base", "snapshot with base", "invertible snapshot", "base of another model", "base of another dtype"],
)
def test_a_manifest_that_contradicts_itself_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="base|nothing"):
        manifest(**changes)


@pytest.mark.parametrize("name", ["../HEAD", "a/b", "", "/etc/passwd"])
def test_a_weight_file_names_no_path(name: str) -> None:
    with pytest.raises(ValidationError, match="name"):
        WeightFile(name=name, size_bytes=1, blake3=HASH)


@pytest.mark.parametrize("contract", [Prompt, RolloutGroup, ScoredGroup, WeightManifest, Completion, SamplingSpec])
def test_rubbish_is_a_validation_error_and_nothing_else(contract: type[BaseModel]) -> None:
    for rubbish in (b"", b"\xff\xfe", b"[]", b'{"schema_version": 1}', b"null"):
        with pytest.raises(ValidationError):
            contract.model_validate_json(rubbish)
