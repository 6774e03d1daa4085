"""A replica's copy of the weights refuses what does not fit before it writes, and is broken if it finds out only afterwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mars_shared.errors import IntegrityError
from mars_shared.weights.bits.codec import encode
from mars_shared.weights.bits.delta import DeltaWriter, delta_meta
from mars_shared.weights.bits.mirror import Mirror
from mirror_builders import (
    History,
    Model,
    Publication,
    bits_of,
    changed,
    content,
    delta,
    expected,
    history,
    identity,
    mend,
    meta_of,
    mirror_of_1_1,
    publication,
    write_delta,
)


@pytest.fixture
def past(tmp_path: Path) -> History:
    return history(tmp_path, 3)


@pytest.fixture
def mirror(tmp_path: Path, past: History) -> Mirror:
    """Holds version 1.1."""
    return mirror_of_1_1(tmp_path / "mirror", past)


# Bad updates: the mirror holds 1.1 and shall go to 1.2.


def truncated(past: History, path: Path) -> Publication:
    good = past.deltas[1]
    path.write_bytes(good.files[0].read_bytes()[:-20])
    return replace(good, files=(path,))


def bit_flipped(past: History, path: Path) -> Publication:
    """In the middle of the last payload, so that records before it are good."""
    good = past.deltas[1]
    data = bytearray(good.files[0].read_bytes())
    data[-30] ^= 4
    path.write_bytes(data)
    return replace(good, files=(path,))


def swapped(past: History, path: Path) -> Publication:
    """The bytes of the next delta in the place of this one's."""
    return replace(past.deltas[1], files=past.deltas[2].files)


def replayed(past: History, path: Path) -> Publication:
    """The delta that led here."""
    return past.deltas[0]


def wrong_base(past: History, path: Path) -> Publication:
    return past.deltas[2]


def wrong_model(past: History, path: Path) -> Publication:
    ends = [identity(past.models[n], n, model="another") for n in (1, 2)]
    return delta(path, past.models[1], past.models[2], *ends)


def unknown_tensor(past: History, path: Path) -> Publication:
    old, new = ({"extra": model["embed.weight"]} for model in past.models[1:3])
    return forged(past, path, old | {"extra": old["extra"] + 1}, new)


def other_shape(past: History, path: Path) -> Publication:
    old, new = ({"embed.weight": past.models[1]["embed.weight"].reshape(16, 40) + more} for more in (0, 1))
    return forged(past, path, old, new)


def forged(past: History, path: Path, old: Model, new: Model) -> Publication:
    """A delta between other tensors with the manifest and the description of the good one."""
    base, target = past.weights[1], past.weights[2]
    write_delta(path, delta_meta(base, target.version), old, new)
    return publication(target, [path], kind="delta", base=base, invertible=True)


def bare(past: History, path: Path) -> Publication:
    """A file that does not say what it belongs to."""
    write_delta(path, {}, *past.models[1:3])
    return replace(past.deltas[1], files=(path,))


BAD_UPDATES = {
    truncated: "cut off",
    bit_flipped: "damaged|zstd|CRC",
    swapped: "says it is the delta",
    replayed: r"expected the delta to lead from 1\.1 .*, which is held; it leads from 1\.0 ",
    wrong_base: r"expected the delta to lead from 1\.1 .*, which is held; it leads from 1\.2 ",
    wrong_model: r"expected the delta to lead from 1\.1 .*, which is held; it leads from 1\.1 ",
    unknown_tensor: "changes a tensor extra, which the held weights don't have",
    other_shape: r"tensor embed.weight: expected float32 \(40, 16\) as held, the delta changes float32 \(16, 40\)",
    bare: "says it is the delta {}; expected",
}


@pytest.mark.parametrize(("spoil", "said"), BAD_UPDATES.items(), ids=lambda item: getattr(item, "__name__", ""))
def test_a_bad_update_is_refused_before_a_byte_is_written(
    spoil: Any, said: str, tmp_path: Path, past: History, mirror: Mirror
) -> None:
    bad = spoil(past, tmp_path / "bad")
    before = [path.read_bytes() for path in mirror.paths]
    with pytest.raises(IntegrityError, match=said):
        mirror.apply(*bad.delta)
    assert [path.read_bytes() for path in mirror.paths] == before
    assert mirror.weights == past.weights[1]
    mirror.verify_full()
    mirror.apply(*past.deltas[1].delta)
    assert content(mirror) == expected(past.models[2])


def test_a_delta_that_ends_badly_after_good_tensors_changes_none_of_them(tmp_path: Path, past: History, mirror: Mirror) -> None:
    """The first record is good, the last one does not decode: nothing may be written until all were looked at."""
    base, target = past.weights[1], past.weights[2]
    path = tmp_path / "delta"
    good, bad = (encode(*(bits_of(model[name]) for model in pair))[0] for name, pair in _two_changes(past))
    assert good is not None and bad is not None
    with path.open("wb") as file:
        writer = DeltaWriter(file, delta_meta(base, target.version))
        writer.add("embed.weight", "float32", (40, 16), good, 0)
        writer.add("head.weight", "float32", (16, 8), replace(bad, changed=bad.changed + 1), 0)
        writer.close()
    before = content(mirror)
    with pytest.raises(IntegrityError, match="gaps and steps"):
        mirror.apply(publication(target, [path], kind="delta", base=base).manifest, path)
    assert content(mirror) == before
    assert mirror.weights == base


def _two_changes(past: History) -> list[tuple[str, tuple[Model, Model]]]:
    held = past.models[1]
    new = {name: held[name].copy() for name in ("embed.weight", "head.weight")}
    for array in new.values():
        bits_of(array)[5] += np.uint32(1)
    return [(name, (held, new)) for name in new]


def test_to_undo_a_delta_its_target_must_be_held_with_the_bits_that_it_made(
    tmp_path: Path, past: History, mirror: Mirror
) -> None:
    before = content(mirror)
    with pytest.raises(IntegrityError, match=r"from 1\.1 .*, which is held; it leads from 1\.2 "):
        mirror.undo(*past.deltas[1].delta)
    path = tmp_path / "forged"
    invertible = write_delta(path, meta_of(past, 0), past.models[2], past.models[3])
    assert invertible
    with pytest.raises(IntegrityError, match="the delta makes another tensor"):
        mirror.undo(past.deltas[0].manifest, path)
    assert content(mirror) == before
    mirror.undo(*past.deltas[0].delta)
    assert content(mirror) == expected(past.models[0])


def test_a_delta_that_makes_other_bits_than_it_says_breaks_the_mirror_and_a_snapshot_mends_it(
    tmp_path: Path, past: History, mirror: Mirror
) -> None:
    """Steps of another pair of versions under the names of 1.1 and 1.2: each record's own checksum tells."""
    path = tmp_path / "forged"
    write_delta(path, meta_of(past, 1), past.models[0], past.models[1])
    names = ", ".join(name for name in past.models[0] if name in changed(*past.models[:2]))
    with pytest.raises(
        IntegrityError, match=rf"did not make the weights 1\.2 \(.*\): tensors differ \({names}\); take a snapshot"
    ):
        mirror.apply(publication(past.weights[2], [path], kind="delta", base=past.weights[1]).manifest, path)
    mend(mirror, past)


def test_a_delta_that_leaves_a_tensor_out_breaks_the_mirror(tmp_path: Path, past: History, mirror: Mirror) -> None:
    path = tmp_path / "forged"
    left_out = next(iter(changed(*past.models[1:3])))
    write_delta(path, meta_of(past, 1), past.models[1], past.models[2] | {left_out: past.models[1][left_out]})
    with pytest.raises(IntegrityError, match="the delta cannot tell"):
        mirror.apply(publication(past.weights[2], [path], kind="delta", base=past.weights[1]).manifest, path)
    mend(mirror, past)


def test_an_undone_delta_that_does_not_lead_to_its_base_breaks_the_mirror(tmp_path: Path, past: History, mirror: Mirror) -> None:
    """It makes the held tensors, but from others than those of 1.0."""
    other = past.models[0] | {"embed.weight": past.models[0]["embed.weight"].copy()}
    bits_of(other["embed.weight"])[7] ^= np.uint32(1)
    path = tmp_path / "forged"
    assert write_delta(path, meta_of(past, 0), other, past.models[1])
    with pytest.raises(IntegrityError, match=r"did not make the weights 1\.0 "):
        mirror.undo(past.deltas[0].manifest, path)
    mend(mirror, past)


def test_a_full_look_finds_what_changed_behind_the_mirrors_back(past: History, mirror: Mirror) -> None:
    with mirror.paths[0].open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    # The file's last tensor: safetensors writes them by name within a dtype.
    with pytest.raises(IntegrityError, match=r"does not hold the bits of 1\.1 \(.*\): tensors norm.weight differ"):
        mirror.verify_full()
    mend(mirror, past)


def test_a_delta_whose_manifest_does_not_call_it_invertible_is_not_undone(past: History, mirror: Mirror) -> None:
    manifest = past.deltas[0].manifest.model_copy(update={"invertible": False})
    with pytest.raises(IntegrityError, match=r"publication 1\.1-.*-delta cannot be undone; plan another route"):
        mirror.undo(manifest, past.deltas[0].files[0])
    assert mirror.weights == past.weights[1]
