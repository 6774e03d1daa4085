"""What pruning keeps: what late joiners and living readers may need. Sizes and ways are computed by hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mars_shared.errors import InputError
from mars_shared.weights import READER_S, WeightsStore
from test_weights_store import publish
from weights_builders import listed, publish_delta, publish_snapshot, weights


@pytest.fixture
def store(tmp_path: Path) -> WeightsStore:
    return WeightsStore(tmp_path)


def chain(store: WeightsStore, steps: int, *, snapshot_every: int, delta_bytes: int = 1, invertible: bool = False) -> None:
    """Versions 1.0 to 1.<steps>: 1.0 a snapshot of 7 bytes, each other one a delta and every so often a snapshot too."""
    publish_snapshot(store, weights(0))
    for step in range(1, steps + 1):
        publish_delta(store, weights(step), weights(step - 1), b"d" * delta_bytes, invertible=invertible)
        if step % snapshot_every == 0:
            publish_snapshot(store, weights(step), announce=False)


def deltas(first: int, last: int) -> list[str]:
    return [f"1.{step} delta" for step in range(first, last + 1)]


def test_the_newest_snapshots_are_kept_in_the_order_of_versions(store: WeightsStore) -> None:
    for incarnation, step in ((1, 9), (1, 10), (1, 11), (2, 2)):
        publish(store, step, incarnation=incarnation)
    store.prune(keep_snapshots=2)
    assert listed(store) == ["1.11 snapshot", "2.2 snapshot"]


def test_fewer_than_are_kept_all_stay(store: WeightsStore) -> None:
    publish(store, 0)
    store.prune(keep_snapshots=4)
    assert listed(store) == ["1.0 snapshot"]


def test_deltas_newer_than_the_oldest_kept_snapshot_stay(store: WeightsStore) -> None:
    chain(store, 7, snapshot_every=3)
    store.prune(keep_snapshots=2)
    # Snapshots 1.3 and 1.6 are kept; the delta that leads to 1.3 is not newer than it.
    assert listed(store) == ["1.3 snapshot", "1.4 delta", "1.5 delta", "1.6 delta", "1.6 snapshot", "1.7 delta"]
    store.prune(keep_snapshots=1)
    assert listed(store) == ["1.6 snapshot", "1.7 delta"]


def test_all_publications_of_the_announced_weights_stay(store: WeightsStore) -> None:
    chain(store, 6, snapshot_every=3)
    store.prune(keep_snapshots=1)
    assert listed(store) == ["1.6 delta", "1.6 snapshot"]


def test_a_head_that_went_back_stays_with_the_way_to_it(store: WeightsStore) -> None:
    chain(store, 6, snapshot_every=3)
    back = publish_delta(store, weights(5, content=b"others"), weights(4), b"dd")
    store.prune(keep_snapshots=1)
    # Snapshot 1.6 is the newest, but no way leads from it to HEAD; the cheapest one does from snapshot 1.3.
    assert store.head() == back
    assert listed(store) == ["1.3 snapshot", "1.4 delta", "1.5 delta", "1.6 snapshot"]
    assert back in store.manifests()


def test_the_deltas_from_what_a_living_reader_serves_stay(store: WeightsStore) -> None:
    chain(store, 7, snapshot_every=3)
    store.register("rollout-0", weights(2).weights_id)
    store.prune(keep_snapshots=1)
    # 1.2 to 1.7 by five deltas of one byte, fewer than the 7 bytes of a snapshot.
    assert listed(store) == [*deltas(3, 6), "1.6 snapshot", "1.7 delta"]


@pytest.mark.parametrize(("delta_bytes", "kept"), [(2, True), (3, False)])
def test_a_reader_that_had_better_read_a_snapshot_keeps_nothing(store: WeightsStore, delta_bytes: int, kept: bool) -> None:
    chain(store, 4, snapshot_every=4, delta_bytes=delta_bytes)
    store.register("rollout-0", weights(1).weights_id)
    store.prune(keep_snapshots=1)
    # Three deltas are 6 bytes, or 9; a snapshot is 7.
    assert listed(store) == [*(deltas(2, 3) if kept else []), "1.4 delta", "1.4 snapshot"]


def test_a_reader_of_a_dead_incarnation_keeps_the_way_back_to_the_fork(store: WeightsStore) -> None:
    chain(store, 5, snapshot_every=9, invertible=True)
    fork = weights(3, incarnation=2, content=b"2.3")
    publish_delta(store, fork, weights(2))  # 1.3 to 1.5 are lost; incarnation 2 goes on from 1.2
    publish_snapshot(store, fork, b"sevenBy", announce=False)
    store.register("rollout-0", weights(4).weights_id)
    store.register("rollout-1", None)
    store.prune(keep_snapshots=1)
    # 1.4 -> 1.3 -> 1.2 backwards and 2.3 forward: 1 + 1 + 5 bytes = a snapshot's 7. Nobody needs 1.5, or 1.1 and 1.2.
    assert listed(store) == ["1.3 delta", "1.4 delta", "2.3 delta", "2.3 snapshot"]


def test_deltas_that_lead_forward_alone_keep_no_way_back(store: WeightsStore) -> None:
    chain(store, 5, snapshot_every=9)
    fork = weights(3, incarnation=2, content=b"2.3")
    publish_delta(store, fork, weights(2))
    publish_snapshot(store, fork, b"sevenBy", announce=False)
    store.register("rollout-0", weights(4).weights_id)
    store.prune(keep_snapshots=1)
    assert listed(store) == ["2.3 delta", "2.3 snapshot"]


def test_a_reader_that_was_not_heard_of_for_long_keeps_nothing(store: WeightsStore, tmp_path: Path) -> None:
    chain(store, 7, snapshot_every=3)
    store.register("rollout-0", weights(2).weights_id)
    store.register("rollout-1", weights(5).weights_id)
    file = tmp_path / "readers" / "rollout-0.json"
    long_ago_s = file.stat().st_mtime - READER_S - 1
    os.utime(file, (long_ago_s, long_ago_s))
    store.prune(keep_snapshots=1)
    assert listed(store) == ["1.6 delta", "1.6 snapshot", "1.7 delta"]
    assert [path.name for path in (tmp_path / "readers").iterdir()] == ["rollout-1.json"]


def test_a_reader_that_registers_again_is_known_by_what_it_serves_then(store: WeightsStore) -> None:
    chain(store, 7, snapshot_every=3)
    store.register("rollout-0", weights(1).weights_id)
    store.register("rollout-0", weights(7).weights_id)
    store.prune(keep_snapshots=1)
    assert listed(store) == ["1.6 snapshot", "1.7 delta"]


def test_a_registration_that_cannot_be_read_does_not_count_and_is_logged(
    store: WeightsStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish(store, 0)
    store.register("rollout-0", None)
    (tmp_path / "readers" / "rollout-0.json").write_text("{")
    store.prune(keep_snapshots=1)
    assert any("rollout-0.json is no registration" in line for line in caplog.messages)


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "../HEAD", "a\n", "x" * 129])
def test_a_reader_whose_name_cannot_be_a_files_is_refused(store: WeightsStore, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="reader .*expected 1 to 128 letters"):
        store.register(name, None)
    assert list(tmp_path.iterdir()) == []
