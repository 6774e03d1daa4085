"""Bad updates on the real engine: refused and counted, the old weights answer as before, and a complaint leads on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mars_rollout.engine.base import Engine
from mars_rollout.group import GroupMaker
from mars_shared.contracts import WeightIdentity, WeightManifest, WeightsKind
from mars_shared.files import write_atomic
from mars_shared.weights import MANIFEST
from mars_shared.weights.bits.codec import encode
from mars_shared.weights.bits.delta import DeltaWriter, delta_meta
from mars_shared.weights.publications import HEAD
from mars_trainer.model import Policy as TrainerPolicy
from mars_trainer.publish import DELTA_FILE, bits_of, policy_tensors
from rollout_fixtures import RunFolder, adhoc, make_prompt, publish
from test_agreement import BOUND, largest_difference
from weight_line import Line, make_line, refused, said

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]


@pytest.fixture
async def line(engine: Engine, run_folder: RunFolder, trainer_policy: TrainerPolicy, tmp_path: Path) -> Line:
    """Versions 0 to 2 are published; the replica serves 2 once it follows."""
    line = make_line(tmp_path, engine, run_folder.recipe, trainer_policy)
    for seed in range(3):
        line.change(seed)
        line.publish()
    return line


# What is done to a line that serves version 2 and publishes version 3.


def delta_of(line: Line, step: int) -> WeightManifest:
    return next(m for m in line.store.manifests() if m.version.step == step and m.kind is WeightsKind.DELTA)


def delta_file(line: Line, step: int) -> Path:
    return line.store.folder(delta_of(line, step)) / DELTA_FILE


def next_version(line: Line) -> WeightManifest:
    line.change(3)
    return line.publish()


def truncated(line: Line) -> None:
    next_version(line)
    file = delta_file(line, 3)
    file.write_bytes(file.read_bytes()[:-100])


def bit_flipped(line: Line) -> None:
    next_version(line)
    data = bytearray(delta_file(line, 3).read_bytes())
    data[len(data) // 2] ^= 1
    delta_file(line, 3).write_bytes(data)


def swapped_files(line: Line) -> None:
    next_version(line)
    exchange(delta_file(line, 2), delta_file(line, 3))


def swapped_manifests(line: Line) -> None:
    next_version(line)
    exchange(*(line.store.folder(delta_of(line, step)) / MANIFEST for step in (2, 3)))


def exchange(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def replayed_version(line: Line) -> None:
    write_atomic(line.store.root / HEAD, delta_of(line, 1).model_dump_json().encode())


def replayed_delta(line: Line) -> None:
    """The delta from 1 to 2 as the one from 2 to 3."""
    bits = delta_file(line, 2).read_bytes()
    forge(line, delta_of(line, 2), lambda path, _: path.write_bytes(bits) and None)


def wrong_base(line: Line) -> None:
    """A delta from version 2 that says it leads from version 1."""
    forge(line, delta_of(line, 1), lambda path, genuine: path.write_bytes(genuine) and None)


def wrong_base_that_lies(line: Line) -> None:
    """A delta whose steps were counted from other weights than those that it names."""
    base = delta_of(line, 2)

    def write(path: Path, _: bytes) -> None:
        with path.open("wb") as file:
            writer = DeltaWriter(file, delta_meta(base, line.version))
            for name, tensor in policy_tensors(line.model, torch.float32):
                encoded, _change = encode(bits_of(tensor * 1.01), bits_of(tensor))
                if encoded is not None:
                    writer.add(name, "float32", tuple(tensor.shape), encoded, 0)
            writer.close()

    forge(line, base, write)


def forge(line: Line, base: WeightManifest, write: Callable[[Path, bytes], None]) -> None:
    """Version 3, whose delta's file is another than the genuine one, or has another base."""
    version = line.version
    manifest = next_version(line)
    line.version = version
    genuine = delta_file(line, 3).read_bytes()
    line.store._remove(line.store.folder(manifest))
    staged = line.store.stage()
    write(staged / DELTA_FILE, genuine)
    line.store.publish(staged, identity=manifest, kind=WeightsKind.DELTA, base=base, invertible=True)
    line.version = version.model_copy(update={"step": version.step + 1})


def wrong_model(line: Line) -> None:
    other = WeightIdentity(**{**dict(next_version(line).identity), "model": "0" * 64})
    staged = line.store.stage()
    (staged / DELTA_FILE).write_bytes(b"")
    line.store.publish(staged, identity=other, kind=WeightsKind.SNAPSHOT)


BAD_UPDATES = {
    truncated: "damaged",
    bit_flipped: "damaged",
    swapped_files: "damaged",
    swapped_manifests: "unreachable",
    replayed_delta: "damaged",
    wrong_base: "damaged",
    wrong_base_that_lies: "damaged",
    replayed_version: "replayed",
    wrong_model: "model",
}


@pytest.mark.parametrize(("spoil", "reason"), BAD_UPDATES.items(), ids=lambda item: getattr(item, "__name__", ""))
async def test_a_bad_update_is_refused_and_the_old_weights_answer_until_a_good_one_comes(
    spoil: Callable[[Line], None], reason: str, line: Line, engine: Engine, maker: GroupMaker, run_folder: RunFolder
) -> None:
    prompt = adhoc(make_prompt(run_folder.blobs))
    async with line.followed():
        await line.until(lambda: line.policy.current)
        served, before = engine.weights_id, said(await maker.make(prompt))
        count = refused(reason)
        spoil(line)
        await line.until(lambda: refused(reason) > count)
        assert engine.weights_id == served and not line.policy.current and line.policy.fault is None
        assert said(await maker.make(prompt)) == before
        assert line.policy.damage
        if reason in ("damaged", "unreachable"):
            await line.until(line.publisher.needs_snapshot)
            assert engine.weights_id == served
            good = line.publisher.mend()
        else:
            line.change(4)
            good = line.publish()
        await line.until_served(good, engine)
        assert line.policy.damage is None
        await line.policy.verify()
    assert largest_difference(line.trainer, await maker.make(prompt)) < BOUND


async def test_a_damaged_delta_is_gone_around_without_a_complaint_where_a_snapshot_leads_there(
    line: Line, engine: Engine
) -> None:
    async with line.followed():
        await line.until(lambda: line.policy.current)
        count = refused("damaged")
        next_version(line)
        manifest = line.publisher.mend()
        line.store.folder(delta_of(line, 3)).joinpath(DELTA_FILE).write_bytes(b"rubbish")
        await line.until_served(manifest, engine)
        assert refused("damaged") == count + 1 and not line.publisher.needs_snapshot()
        assert line.policy.arrival.startswith(f"snapshot {manifest.version} (")


# Snapshots that verify and do not fit the model; the names are those of the tiny policy.


def named(tensors: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in tensors if part in name)


def part_of_a_fused_weight_is_missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[named(tensors, "layers.1.self_attn.k_proj.weight")]


def a_norm_is_missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[named(tensors, "layers.1.input_layernorm.weight")]


def the_embedding_is_missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[named(tensors, "embed_tokens.weight")]


def a_row_too_many(tensors: dict[str, torch.Tensor]) -> None:
    """vLLM's loader by itself would cut it off."""
    name = named(tensors, "layers.1.mlp.gate_proj.weight")
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])


def a_row_too_few(tensors: dict[str, torch.Tensor]) -> None:
    name = named(tensors, "layers.1.self_attn.q_proj.weight")
    tensors[name] = tensors[name][1:].contiguous()


def a_vector_of_one_value(tensors: dict[str, torch.Tensor]) -> None:
    name = named(tensors, "layers.1.input_layernorm.weight")
    tensors[name] = tensors[name][:1].clone()


def one_too_many(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.language_model.layers.1.extra.weight"] = torch.ones(3)


MISFITS = [
    part_of_a_fused_weight_is_missing,
    a_norm_is_missing,
    the_embedding_is_missing,
    a_row_too_many,
    a_row_too_few,
    a_vector_of_one_value,
    one_too_many,
]


@pytest.mark.parametrize("misfit", MISFITS, ids=lambda misfit: misfit.__name__)
async def test_a_whole_snapshot_that_does_not_fit_the_model_is_refused_before_a_byte_is_written(
    misfit: Callable[[dict[str, torch.Tensor]], None], line: Line, engine: Engine, maker: GroupMaker, run_folder: RunFolder
) -> None:
    prompt = adhoc(make_prompt(run_folder.blobs))
    async with line.followed():
        await line.until(lambda: line.policy.current)
        served, before, files = engine.weights_id, said(await maker.make(prompt)), [line_copy(line)]
        count = refused("engine")
        line.change(3)
        tensors = {name: tensor.clone() for name, tensor in policy_tensors(line.model, torch.float32)}
        misfit(tensors)
        publish(line.store, tensors, line.version, run_folder.recipe.model.path)
        await line.until(lambda: refused("engine") > count)
        assert engine.alive and engine.weights_id == served
        await engine.compare(files)
        assert said(await maker.make(prompt)) == before
        line.version = line.version.model_copy(update={"step": line.version.step + 1})
        await line.until_served(line.publish(), engine)
    assert largest_difference(line.trainer, await maker.make(prompt)) < BOUND


def line_copy(line: Line) -> Path:
    """The served weights in a file of the test's own."""
    path = line.store.root.parent / "served.safetensors"
    save_file(dict(policy_tensors(line.model, torch.float32)), path)
    return path
