"""A replica reaches the wanted weights with the fewest bytes, and says how."""

from __future__ import annotations

from hashlib import sha256
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mars_shared.contracts import PolicyVersion, WeightFile, WeightIdentity, WeightManifest
from mars_shared.errors import IntegrityError, NoRouteError
from mars_shared.weights.route import HopKind, Route, plan_route

SNAPSHOT_BYTES = 1000
DELTA_BYTES = 10


def weights(version: str, *, bits: str | None = None, **updates: Any) -> WeightIdentity:
    incarnation, step = map(int, version.split("."))
    values: dict[str, Any] = {
        "run": "r",
        "model": "m",
        "dtype": "bfloat16",
        "checksum": sha256((bits or version).encode()).hexdigest(),
    }
    return WeightIdentity(version=PolicyVersion(incarnation=incarnation, step=step), **values | updates)


def named(version: str, **updates: Any) -> str:
    return weights(version, **updates).weights_id


def publication(target: WeightIdentity, size_bytes: int, **values: Any) -> WeightManifest:
    file = WeightFile(name="file", size_bytes=size_bytes, blake3="ab" * 32)
    return WeightManifest(**target.model_dump(), files=(file,), **values)


def snapshot(version: str, size_bytes: int = SNAPSHOT_BYTES, **updates: Any) -> WeightManifest:
    return publication(weights(version, **updates), size_bytes, kind="snapshot")


def delta(
    base: str,
    target: str,
    size_bytes: int = DELTA_BYTES,
    *,
    invertible: bool = True,
    base_bits: str | None = None,
    **updates: Any,
) -> WeightManifest:
    return publication(
        weights(target, **updates),
        size_bytes,
        kind="delta",
        base=weights(base, **{**updates, "bits": base_bits}),
        invertible=invertible,
    )


def chain(first: int, last: int, **updates: Any) -> list[WeightManifest]:
    """Deltas of incarnation 1 from step to step."""
    return [delta(f"1.{step}", f"1.{step + 1}", **updates) for step in range(first, last)]


def hops(route: Route) -> list[tuple[str, str]]:
    return [(hop.kind.value, str(hop.weights.version)) for hop in route.hops]


def test_what_is_held_already_costs_nothing() -> None:
    route = plan_route([snapshot("1.0"), *chain(0, 3)], named("1.3"), named("1.3"))
    assert (hops(route), route.bytes, str(route)) == ([], 0, "1.3 already (0 B)")


def test_a_late_joiner_reads_one_snapshot_and_the_deltas_after_it() -> None:
    store = [snapshot("1.40", 1_000_000), *chain(30, 43, size_bytes=60_000), snapshot("1.30", 1_000_000)]
    route = plan_route(store, None, named("1.43"))
    assert hops(route) == [("snapshot", "1.40"), ("apply", "1.41"), ("apply", "1.42"), ("apply", "1.43")]
    # 1 000 000 + 3 * 60 000
    assert route.bytes == 1_180_000
    assert str(route) == "snapshot 1.40, then 3 deltas to 1.43 (1.2 MB)"


@pytest.mark.parametrize("head", range(40, 60))
def test_with_a_snapshot_every_10_versions_a_joiner_reads_at_most_9_deltas(head: int) -> None:
    store = [*chain(0, head), *(snapshot(f"1.{step}") for step in range(0, head + 1, 10))]
    route = plan_route(store, None, named(f"1.{head}"))
    kinds = [hop.kind for hop in route.hops]
    assert kinds == [HopKind.SNAPSHOT] + [HopKind.APPLY] * (head % 10)
    assert route.bytes == 1000 + 10 * (head % 10)


@pytest.mark.parametrize(
    ("held", "expected_bytes", "expected"),
    [
        # The snapshot 1.10 and 2 deltas cost 100 + 2 * 15 = 130; from 1.s the deltas cost (12 - s) * 15.
        ("1.11", 15, "1 delta to 1.12 (15 B)"),
        ("1.4", 120, "8 deltas to 1.12 (120 B)"),
        ("1.3", 130, "snapshot 1.10, then 2 deltas to 1.12 (130 B)"),
        ("1.0", 130, "snapshot 1.10, then 2 deltas to 1.12 (130 B)"),
    ],
)
def test_a_laggard_takes_deltas_or_a_snapshot_whichever_is_fewer_bytes(held: str, expected_bytes: int, expected: str) -> None:
    route = plan_route([snapshot("1.10", 100), *chain(0, 12, size_bytes=15)], named(held), named("1.12"))
    assert (route.bytes, str(route)) == (expected_bytes, expected)


def test_of_ways_with_equal_bytes_the_one_with_fewer_hops_is_taken() -> None:
    # From 1.0 to 1.3 by 1.1 and 1.2: 0 + 0 + 30 bytes, 3 hops, seen first; by 1.4: 30 + 0 bytes, 2 hops.
    long = [delta("1.0", "1.1", 0), delta("1.1", "1.2", 0), delta("1.2", "1.3", 30)]
    route = plan_route([*long, delta("1.0", "1.4", 30), delta("1.4", "1.3", 0)], named("1.0"), named("1.3"))
    assert (hops(route), route.bytes) == ([("apply", "1.4"), ("apply", "1.3")], 30)


def test_weights_of_a_dead_incarnation_are_undone_to_where_the_next_one_began() -> None:
    """Incarnation 2 goes on from the checkpoint of 1.40: its 2.40 has the same bits, whatever incarnation 1 did after."""
    store = [
        snapshot("1.40"),
        *chain(40, 42, size_bytes=700),
        snapshot("2.40", 5000, bits="1.40"),
        delta("2.40", "2.41", 20, base_bits="1.40"),
    ]
    route = plan_route(store[1:], named("1.42"), named("2.40", bits="1.40"))
    assert hops(route) == [("undo", "1.41"), ("undo", "1.40"), ("rename", "2.40")]
    assert route.bytes == 1400
    assert str(route) == "2 deltas undone to 1.40, the same weights as 2.40 (1.4 kB)"
    # With snapshot 1.40 in the store: 1000 instead of 2 * 700; then 20 for the delta.
    route = plan_route(store, named("1.42"), named("2.41"))
    assert hops(route) == [("snapshot", "1.40"), ("rename", "2.40"), ("apply", "2.41")]
    assert route.bytes == 1020
    assert str(route) == "snapshot 1.40, the same weights as 2.40, then 1 delta to 2.41 (1.0 kB)"


def test_the_same_bits_under_another_version_cost_nothing() -> None:
    route = plan_route([snapshot("1.7"), snapshot("2.7", bits="1.7")], named("1.7"), named("2.7", bits="1.7"))
    assert (hops(route), route.bytes) == ([("rename", "2.7")], 0)
    assert route.hops[0].manifest is None
    assert str(route) == "the same weights as 2.7 (0 B)"


@pytest.mark.parametrize("difference", [{"dtype": "float32"}, {"bits": "others"}])
def test_weights_of_another_dtype_or_other_bits_are_not_the_same(difference: dict[str, str]) -> None:
    store = [snapshot("1.7"), snapshot("2.7", **{"bits": "1.7"} | difference)]
    route = plan_route(store, named("1.7"), store[1].weights_id)
    assert (hops(route), route.bytes) == ([("snapshot", "2.7")], 1000)


def test_a_rollback_undoes_deltas() -> None:
    route = plan_route([snapshot("1.0"), *chain(0, 5)], named("1.5"), named("1.2"))
    assert hops(route) == [("undo", "1.4"), ("undo", "1.3"), ("undo", "1.2")]
    assert [hop.manifest.version.step for hop in route.hops if hop.manifest] == [5, 4, 3]
    assert (route.bytes, str(route)) == (30, "3 deltas undone to 1.2 (30 B)")


def test_a_delta_that_is_not_invertible_is_never_undone() -> None:
    store = [snapshot("1.0"), *chain(0, 2), delta("1.2", "1.3", invertible=False)]
    # 1.3 cannot be undone, so the rollback to 1.2 reads snapshot 1.0 and 2 deltas: 1000 + 2 * 10.
    route = plan_route(store, named("1.3"), named("1.2"))
    assert (hops(route), route.bytes) == ([("snapshot", "1.0"), ("apply", "1.1"), ("apply", "1.2")], 1020)


def test_weights_that_no_publication_names_count_as_nothing() -> None:
    route = plan_route([snapshot("1.9")], named("1.3"), named("1.9"))
    assert hops(route) == [("snapshot", "1.9")]


@pytest.mark.parametrize("stranger", [{"run": "another"}, {"model": "another"}])
def test_publications_of_another_run_or_model_are_never_used(stranger: dict[str, str]) -> None:
    store = [
        snapshot("1.0"),
        *chain(0, 2),
        snapshot("1.2", 1, **stranger),
        snapshot("1.0", 1, **stranger),
        *chain(0, 2, size_bytes=1, **stranger),
    ]
    for held in (None, named("1.2", **stranger)):
        route = plan_route(store, held, named("1.2"))
        assert (hops(route), route.bytes) == ([("snapshot", "1.0"), ("apply", "1.1"), ("apply", "1.2")], 1020)


def test_a_delta_from_another_runs_weights_is_never_used() -> None:
    base = weights("1.0", run="another")
    bridge = publication(weights("1.1"), 1, kind="delta", base=base)
    assert hops(plan_route([bridge, snapshot("1.1")], base.weights_id, named("1.1"))) == [("snapshot", "1.1")]


def test_without_a_way_the_error_says_what_is_missing() -> None:
    with pytest.raises(NoRouteError) as caught:
        plan_route([*chain(7, 9), snapshot("2.0")], named("1.3"), named("1.9"))
    assert str(caught.value) == (
        "no way from nothing to 1.9: nothing leads to it but 1.7, 1.8, of which no snapshot is left; "
        "the store holds snapshot 2.0, delta 1.8 to 1.9, delta 1.7 to 1.8; a snapshot of 1.9 mends it"
    )
    with pytest.raises(NoRouteError, match=r"no way from 1\.9 to 1\.0: nothing leads to it; the store holds delta 1\.0 to 1\.9;"):
        plan_route([delta("1.0", "1.9", invertible=False)], named("1.9"), named("1.0"))


def test_weights_that_no_publication_names_cannot_be_reached() -> None:
    wanted = named("1.40")
    listed = "delta 1.11 to 1.12, .*, delta 1.4 to 1.5, 5 older ones$"
    with pytest.raises(
        IntegrityError, match=f"no way to weights {wanted[:16]}: no publication names them; the store holds {listed}"
    ):
        plan_route([snapshot("1.0"), *chain(0, 12)], named("1.3"), wanted)
    with pytest.raises(NoRouteError, match="the store holds nothing"):
        plan_route([], None, wanted)


def test_sizes_are_told_in_decimal_units() -> None:
    told = [
        str(plan_route([snapshot("1.0", size)], None, named("1.0")))
        for size in (0, 999, 1000, 15_500, 999_600, 1_200_000, 18 * 10**9)
    ]
    assert [words.partition("(")[2] for words in told] == ["0 B)", "999 B)", "1.0 kB)", "16 kB)", "1.0 MB)", "1.2 MB)", "18 GB)"]


VERSIONS = ["1.0", "1.1", "1.2", "2.0", "2.1"]
sizes = st.integers(0, 6)
snapshots = st.builds(snapshot, st.sampled_from(VERSIONS), sizes)
deltas = st.builds(
    lambda ends, size, invertible: delta(*ends, size, invertible=invertible),
    st.sampled_from(list(permutations(VERSIONS, 2))),
    sizes,
    st.booleans(),
)
BITS = {"2.0": "1.1"}
"""2.0 has the bits of 1.1."""


def with_shared_bits(item: WeightManifest) -> WeightManifest:
    def shared(identity: WeightIdentity) -> WeightIdentity:
        return weights(str(identity.version), bits=BITS.get(str(identity.version)))

    base = None if item.base is None else shared(item.base)
    return publication(shared(item), item.size_bytes, kind=item.kind, base=base, invertible=item.invertible)


def cheapest(store: list[WeightManifest], held: str | None, wanted: str) -> tuple[int, int] | None:
    """(bytes, hops) by relaxing every edge as often as there are nodes (Bellman and Ford)."""
    named_versions = {str(end.version) for item in store for end in (item, item.base) if end is not None}
    edges: list[tuple[str | None, str, int]] = []
    for item in store:
        base, target = item.base and str(item.base.version), str(item.version)
        edges.append((base, target, item.size_bytes))
        if item.invertible and base:
            edges.append((target, base, item.size_bytes))
    if {"2.0", "1.1"} <= named_versions:
        edges += [("2.0", "1.1", 0), ("1.1", "2.0", 0)]
    best: dict[str | None, tuple[int, int]] = {None: (0, 0), held: (0, 0)}
    for _ in range(len(VERSIONS) + 1):
        for start, end, size in edges:
            if start in best:
                best[end] = min(best.get(end, (10**9, 0)), (best[start][0] + size, best[start][1] + 1))
    return best.get(wanted)


@settings(max_examples=300, deadline=None)
@given(
    store=st.lists(st.one_of(snapshots, deltas).map(with_shared_bits), min_size=1, max_size=9),
    held=st.sampled_from([None, *VERSIONS]),
    data=st.data(),
)
def test_the_way_costs_what_trying_every_way_finds(store: list[WeightManifest], held: str | None, data: st.DataObject) -> None:
    ends = {str(end.version): end.weights_id for item in store for end in (item, item.base) if end is not None}
    wanted = data.draw(st.sampled_from(sorted(ends)))
    expected = cheapest(store, held, wanted)
    held_id = held and named(held, bits=BITS.get(held))
    if expected is None:
        with pytest.raises(NoRouteError):
            plan_route(store, held_id, ends[wanted])
        return
    route = plan_route(store, held_id, ends[wanted])
    assert (route.bytes, len(route.hops)) == expected
    assert not route.hops or route.hops[-1].weights.weights_id == ends[wanted]
