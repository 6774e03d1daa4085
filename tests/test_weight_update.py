"""Weights change in place: bit for bit, at once, with nothing stale, and not for requests' sake delayed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mars_rollout.adhoc import GroupAnswer
from mars_rollout.engine.base import Engine, EngineRequest
from mars_rollout.group import GroupMaker
from mars_rollout.render import PromptRenderer
from mars_shared.contracts import RolloutGroup
from mars_shared.weights import WeightsStore
from rollout_fixtures import VERSIONS, History, ReplicaProcess, RunFolder, adhoc, make_prompt, png, policy_at, publish

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]


def said(group: RolloutGroup) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    return [(completion.token_ids, completion.logprobs) for completion in group.completions]


async def test_a_replica_updated_ten_times_equals_a_newcomer_bit_by_bit(
    engine: Engine, maker: GroupMaker, run_folder: RunFolder, history: History, replica: ReplicaProcess
) -> None:
    """The newcomer is a replica process that loaded the tenth version alone."""
    import httpx

    for index, manifest in enumerate(history.manifests):
        await engine.update(manifest, history.files(index))
    prompt = adhoc(make_prompt(run_folder.blobs)).model_copy(update={"prompt_id": "adhoc"})
    mine = await maker.make(prompt)
    spec = prompt.sampling
    body = {
        "question": prompt.question,
        "sources": [{"name": source.name, "image": source.blob} for source in prompt.sources],
        "num_generations": spec.num_generations,
        "num_mono": spec.num_mono,
        "max_completion_length": spec.max_completion_length,
        "seed": spec.seed,
    }
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        response = await client.post(f"{replica.url}/v1/rollouts", json=body)
    theirs = GroupAnswer.model_validate_json(response.content).group
    assert theirs.replica == "replica-0" and mine.replica == "in-process"
    assert theirs.policy_version == mine.policy_version == history.manifests[VERSIONS - 1].version
    assert theirs.weights_id == mine.weights_id
    assert theirs.views == mine.views
    assert said(theirs) == said(mine)


async def test_nothing_stale_is_used_after_the_vision_tower_alone_changed(
    engine: Engine, maker: GroupMaker, run_folder: RunFolder, history: History
) -> None:
    """Version 1.3 differs from 1.2 in the vision tower alone; a rollback and a return meet no old values either."""
    prompt = adhoc(make_prompt(run_folder.blobs))
    answers = []
    for index in (1, 2, 1, 2):
        await engine.update(history.manifests[index], history.files(index))
        answers.append(said(await maker.make(prompt)))
        assert said(await maker.make(prompt)) == answers[-1], "the second time from the caches"
    assert answers[0] == answers[2]
    assert answers[1] == answers[3]
    assert answers[0] != answers[1]


async def test_openai_requests_see_no_stale_vision_either(engine: Engine, run_folder: RunFolder, history: History) -> None:
    import base64

    import httpx

    from mars_rollout.engine.http import build_openai_app

    app = await build_openai_app(engine, run_folder.recipe)  # type: ignore[arg-type]
    url = "data:image/png;base64," + base64.b64encode(png(0)).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Which digit?"}]
    body = {"model": "policy", "messages": [{"role": "user", "content": content}], "logprobs": True, "max_tokens": 4, "seed": 1}
    first_logprobs = []
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as client:
        for index in (1, 2, 1):
            await engine.update(history.manifests[index], history.files(index))
            response = await client.post("/v1/chat/completions", json=body)
            assert response.status_code == 200, response.text
            first_logprobs.append(response.json()["choices"][0]["logprobs"]["content"][0]["logprob"])
    assert first_logprobs[0] == first_logprobs[2] != first_logprobs[1]


async def test_no_request_carries_the_new_tag_before_the_change_is_on_its_way(engine: Engine, history: History) -> None:
    """Answered by the old weights, its values would be found under the new ones' name. Requests come in every turn of the loop."""
    llm: Any = engine.llm  # type: ignore[attr-defined]
    core, sent = llm.engine_core, []
    send_message, before = core._send_input_message, llm._tag

    def note_message(message: tuple[bytes, ...], identity: bytes) -> Any:
        sent.append(message[0])
        return send_message(message, identity)

    async def note_request(request: Any) -> None:
        sent.append(request.cache_salt.rstrip("/"))

    async def ask_in_every_turn() -> None:
        tagged = llm._tagged(note_request)
        while True:
            await tagged(SimpleNamespace(cache_salt=None, mm_features=(), external_req_id="x", priority=0))
            await asyncio.sleep(0)

    core._send_input_message = note_message
    try:
        asking = asyncio.create_task(ask_in_every_turn())
        await asyncio.sleep(0.01)
        await engine.update(history.manifests[5], history.files(5))
        asking.cancel()
    finally:
        del core._send_input_message
    from vllm.v1.engine import EngineCoreRequestType

    changed = sent.index(EngineCoreRequestType.UTILITY.value)
    assert changed > 0 and set(sent[:changed]) == {before}
    assert set(sent[changed + 1 :]) == {llm._tag} and len(sent) > changed + 2


async def test_a_request_in_flight_goes_on_over_a_change_and_says_so(
    engine: Engine, renderer: PromptRenderer, run_folder: RunFolder, history: History
) -> None:
    await engine.update(history.manifests[3], history.files(3))
    text = tuple(renderer.token_ids([{"role": "user", "content": "Which digit?"}]))
    request = EngineRequest(text, (), n=2, seed=3, temperature=1.0, top_p=1.0, max_tokens=300, urgent=False)
    answering = asyncio.create_task(engine.generate(request))
    await asyncio.sleep(0.1)
    await engine.update(history.manifests[4], history.files(4))
    answer = await answering
    versions = [history.manifests[3].version, history.manifests[4].version]
    longest = max(answer.completions, key=lambda completion: len(completion.token_ids))
    assert [span.version for span in longest.spans] == versions
    assert longest.spans[0].start == 0
    assert longest.spans[0].end == longest.spans[1].start
    assert longest.spans[1].end == len(longest.token_ids)


async def test_with_continue_a_group_in_flight_goes_on_over_a_change_that_it_tolerates(
    engine: Engine, maker: GroupMaker, run_folder: RunFolder, history: History, model_dir: Path, tmp_path: Path
) -> None:
    """1.4 is current when the group begins, 1.5 is announced while it is made: every token is by one of them."""
    await engine.update(history.manifests[2], history.files(2))
    store = WeightsStore(tmp_path / "weights")
    before, after = (manifest.version for manifest in history.manifests[3:5])
    policy = policy_at(engine, store, model_dir, tmp_path / "scratch", in_flight="continue")
    publish(store, history.tensors[3], before, model_dir)
    long = make_prompt(run_folder.blobs).sampling.model_copy(update={"max_completion_length": 300})
    prompt = make_prompt(run_folder.blobs, policy_version=before, max_staleness=1, sampling=long)

    async def make() -> RolloutGroup:
        async with policy.hold(prompt) as pull_s:
            return await maker.make(prompt, pull_s=pull_s)

    making = asyncio.create_task(make())
    while not policy.current:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    publish(store, history.tensors[4], after, model_dir)
    following = asyncio.create_task(policy.follow())
    group = await making
    following.cancel()
    assert group.policy_version == before
    longest = max(group.completions, key=lambda completion: len(completion.token_ids))
    assert [span.version for span in longest.spans] == [before, after]
    for completion in group.completions:
        ends = [span.end for span in completion.spans]
        assert [span.start for span in completion.spans] == [0, *ends[:-1]]
        assert ends[-1] == len(completion.token_ids)


async def test_changes_under_load_leave_training_answers_unharmed(
    engine: Engine, maker: GroupMaker, run_folder: RunFolder, history: History
) -> None:
    """Groups of samples on shared images are in flight while versions change; afterwards all is as alone."""
    prompt = adhoc(make_prompt(run_folder.blobs))
    await engine.update(history.manifests[5], history.files(5))
    expected = said(await maker.make(prompt))
    for _ in range(3):
        others = [asyncio.create_task(maker.make(prompt)) for _ in range(4)]
        await asyncio.sleep(0.02)
        await engine.update(history.manifests[6], history.files(6))
        await engine.update(history.manifests[5], history.files(5))
        assert said(await maker.make(prompt)) == expected
        await asyncio.gather(*others)
    assert engine.alive
