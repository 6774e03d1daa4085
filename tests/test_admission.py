"""Which prompt may be answered by which weights, case by case; steps are of incarnation 2."""

from __future__ import annotations

import pytest

from builders import make_prompt
from mars_rollout.admission import Served, SupersededError, Verdict, judge
from mars_rollout.engine.base import BASE_WEIGHTS_ID
from mars_shared.contracts import PolicyVersion, Prompt, WeightFile, WeightManifest, WeightsKind
from mars_shared.errors import InputError
from weights_builders import weights

FILE = WeightFile(name="model.safetensors", size_bytes=1, blake3="0" * 64)


def announced(step: int) -> WeightManifest:
    return WeightManifest(**weights(step, incarnation=2).model_dump(), kind=WeightsKind.SNAPSHOT, files=(FILE,))


def serving(step: int) -> Served:
    identity = weights(step, incarnation=2)
    return Served(identity.version, identity.weights_id)


def asks_for(step: int, *, incarnation: int = 2, max_staleness: int = 0) -> Prompt:
    prompt = make_prompt(version=PolicyVersion(incarnation=incarnation, step=step))
    return prompt.model_copy(update={"max_staleness": max_staleness})


@pytest.mark.parametrize(
    ("wanted", "max_staleness", "head", "served", "verdict"),
    [
        (5, 0, 5, 5, Verdict.READY),
        (5, 0, 5, 4, Verdict.PULL),  # announced and not served yet
        (5, 0, 4, 4, Verdict.WAIT),  # not announced yet
        (5, 0, None, 4, Verdict.WAIT),
        (5, 2, 7, 5, Verdict.PULL),  # 5 would do, but nothing begins on old weights while 7 is tolerated
        (5, 2, 7, 7, Verdict.READY),
        (5, 2, 4, 6, Verdict.READY),  # announced is an older one; what is served will do
    ],
)
def test_a_prompt_is_answered_by_its_version_or_one_that_it_tolerates(
    wanted: int, max_staleness: int, head: int | None, served: int, verdict: Verdict
) -> None:
    prompt = asks_for(wanted, max_staleness=max_staleness)
    assert judge(prompt, None if head is None else announced(head), serving(served), refused=None) is verdict


def test_refused_weights_are_not_waited_for_where_those_served_are_tolerated() -> None:
    head = announced(6)
    assert judge(asks_for(5, max_staleness=1), head, serving(5), refused=head.weights_id) is Verdict.READY
    assert judge(asks_for(6), head, serving(5), refused=head.weights_id) is Verdict.WAIT


def test_the_model_folders_own_weights_answer_no_prompt_that_names_a_version() -> None:
    base = Served(PolicyVersion(incarnation=2, step=5), BASE_WEIGHTS_ID)
    assert judge(asks_for(5), announced(4), base, refused=None) is Verdict.WAIT


def test_a_prompt_of_an_ended_incarnation_is_superseded() -> None:
    with pytest.raises(SupersededError, match="older incarnation"):
        judge(asks_for(9, incarnation=1), announced(3), serving(3), refused=None)


def test_a_prompt_whose_version_is_gone_is_refused_with_both_versions() -> None:
    with pytest.raises(InputError, match=r"asks for version 2\.5 with max_staleness 1, but 2\.7 is current"):
        judge(asks_for(5, max_staleness=1), announced(7), serving(7), refused=None)


def test_a_prompt_without_a_version_is_answered_by_whatever_is_served() -> None:
    prompt = make_prompt().model_copy(update={"policy_version": None})
    assert judge(prompt, None, serving(3), refused=None) is Verdict.READY
