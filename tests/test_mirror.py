"""A replica's copy of the weights follows snapshots and deltas bit by bit, forward and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mars_shared.contracts import PolicyVersion
from mars_shared.errors import IntegrityError
from mars_shared.weights.bits.checksum import tensor_checksum
from mars_shared.weights.bits.codec import encode
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
    mirror_of_1_1,
    publication,
    sums_of,
)


@pytest.fixture
def past(tmp_path: Path) -> History:
    return history(tmp_path, 3)


@pytest.fixture
def mirror(tmp_path: Path, past: History) -> Mirror:
    """Holds version 1.1."""
    return mirror_of_1_1(tmp_path / "mirror", past)


def test_a_mirror_begins_with_nothing_and_touches_no_files_of_others(tmp_path: Path, past: History) -> None:
    folder = tmp_path / "deep" / "mirror"
    mirror = Mirror(folder)
    mirror.take_snapshot(past.snapshot.manifest, past.snapshot.files)
    (folder / "notes").write_text("mine")
    mirror = Mirror(folder)
    assert (mirror.weights, mirror.paths) == (None, ())
    assert [path.name for path in folder.iterdir()] == ["notes"]


def test_a_snapshot_is_copied_and_the_stores_files_stay_as_they_are(tmp_path: Path, past: History) -> None:
    before = [path.read_bytes() for path in past.snapshot.files]
    mirror = Mirror(tmp_path / "mirror")
    assert mirror.take_snapshot(past.snapshot.manifest, past.snapshot.files) == past.models[0].keys()
    assert mirror.weights == past.weights[0]
    assert content(mirror) == expected(past.models[0])
    mirror.verify_full()
    mirror.apply(*past.deltas[0].delta)
    assert content(mirror) == expected(past.models[1]) != expected(past.models[0])
    assert [path.read_bytes() for path in past.snapshot.files] == before


def test_fifty_versions_forward_and_all_back_are_exact_to_the_bit(tmp_path: Path) -> None:
    past = history(tmp_path, 50)
    mirror = Mirror(tmp_path / "mirror")
    mirror.take_snapshot(past.snapshot.manifest, past.snapshot.files)
    for step in range(50):
        assert mirror.apply(*past.deltas[step].delta) == changed(*past.models[step : step + 2])
        assert mirror.weights == past.weights[step + 1]
        assert content(mirror) == expected(past.models[step + 1])
    mirror.verify_full()
    for step in reversed(range(50)):
        assert mirror.undo(*past.deltas[step].delta) == changed(*past.models[step : step + 2])
        assert mirror.weights == past.weights[step]
        assert content(mirror) == expected(past.models[step])
    mirror.verify_full()


def whole_change(past: History, tmp_path: Path) -> tuple[Model, Publication]:
    """A delta from 1.1 that gives a tensor new random bits and changes a scalar, which does not pay as a delta."""
    head = np.random.default_rng(9).normal(size=(16, 8)).astype(np.float32)
    new = past.models[1] | {"head.weight": head, "scale": np.array(2.5, np.float32)}
    return new, delta(tmp_path / "whole", past.models[1], new, past.weights[1], identity(new, 2))


def test_a_tensor_stored_whole_is_applied_but_never_undone(tmp_path: Path, past: History, mirror: Mirror) -> None:
    new, publication = whole_change(past, tmp_path)
    assert not publication.manifest.invertible
    assert mirror.apply(*publication.delta) == {"head.weight", "scale"}
    assert content(mirror) == expected(new)
    for manifest in (publication.manifest, publication.manifest.model_copy(update={"invertible": True})):
        with pytest.raises(IntegrityError, match="cannot be undone|stored whole"):
            mirror.undo(manifest, publication.files[0])
        assert content(mirror) == expected(new)


def test_versions_without_a_change_are_followed_too(tmp_path: Path, past: History, mirror: Mirror) -> None:
    nothing = delta(tmp_path / "none", past.models[1], past.models[1], past.weights[1], identity(past.models[1], 2))
    assert mirror.apply(*nothing.delta) == frozenset()
    assert mirror.weights == identity(past.models[1], 2)
    assert mirror.undo(*nothing.delta) == frozenset()
    assert mirror.weights == past.weights[1]


def test_the_same_bits_are_held_under_another_version(past: History, mirror: Mirror) -> None:
    again = past.weights[1].model_copy(update={"version": PolicyVersion(incarnation=2, step=1)})
    mirror.rename(again)
    assert mirror.weights == again
    for other in (identity(past.models[0], 1), identity(past.models[1], 1, run="q"), identity(past.models[1], 1, model="n")):
        with pytest.raises(IntegrityError, match="expected another version of the same bits"):
            mirror.rename(other)
        assert mirror.weights == again


def test_a_snapshot_replaces_what_was_held_file_by_file(tmp_path: Path, past: History, mirror: Mirror) -> None:
    save_file(past.models[3], tmp_path / "all.safetensors")
    whole = publication(past.weights[3], [tmp_path / "all.safetensors"], kind="snapshot")
    mirror.take_snapshot(whole.manifest, whole.files)
    assert (mirror.weights, len(mirror.paths)) == (past.weights[3], 1)
    assert content(mirror) == expected(past.models[3])
    assert list((tmp_path / "mirror").iterdir()) == list(mirror.paths)
    mirror.undo(*past.deltas[2].delta)
    assert content(mirror) == expected(past.models[2])


def test_sums_tell_which_tensors_differ(past: History) -> None:
    first, second = sums_of(past.models[0]), sums_of(past.models[1])
    assert set(first.differing(second)) == changed(*past.models[:2])
    assert first.differing(sums_of(past.models[0])) == []
    assert sums_of({"a": np.ones(2, np.float32)}).differing(sums_of({"b": np.ones(2, np.float32)})) == ["a", "b"]
    with pytest.raises(ValueError, match="expected every tensor once, came scale again"):
        first.add("scale", "float32", (), bits_of(past.models[0]["scale"]))


def test_sums_follow_a_change(past: History) -> None:
    sums = sums_of(past.models[0])
    for name, array in past.models[1].items():
        _, change = encode(bits_of(past.models[0][name]), bits_of(array))
        assert sums.change(name, change) == tensor_checksum(bits_of(array))
    assert sums.checksum == past.weights[1].checksum
