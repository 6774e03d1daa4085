"""The way with the fewest bytes from the weights that a replica holds to the wanted ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from heapq import heappop, heappush
from itertools import count, groupby, permutations

from mars_shared.contracts import WeightIdentity, WeightManifest
from mars_shared.errors import NoRouteError

LISTED = 8
"""Publications that a message names."""


class HopKind(StrEnum):
    """How one hop of a route is made."""

    SNAPSHOT = "snapshot"
    """Read every tensor, whatever is held."""
    APPLY = "apply"
    """Apply a delta: from its base to its target."""
    UNDO = "undo"
    """Undo an invertible delta: from its target to its base."""
    RENAME = "rename"
    """The same bits have another identity too; nothing is read."""


@dataclass(frozen=True)
class Hop:
    """One hop of a route, and the weights held after it."""

    kind: HopKind
    weights: WeightIdentity
    manifest: WeightManifest | None = None
    """What is fetched for it; None for a RENAME."""

    @property
    def size_bytes(self) -> int:
        """What it costs to fetch it."""
        return 0 if self.manifest is None else self.manifest.size_bytes


@dataclass(frozen=True)
class Route:
    """Hops to the wanted weights, none where they are held already.

    >>> str(route)
    'snapshot 1.40, then 3 deltas to 1.43 (1.2 MB)'
    """

    want: WeightIdentity
    hops: tuple[Hop, ...]

    @property
    def bytes(self) -> int:
        """What all of it costs to fetch."""
        return sum(hop.size_bytes for hop in self.hops)

    def __str__(self) -> str:
        legs = [(kind, list(hops)) for kind, hops in groupby(self.hops, key=lambda hop: hop.kind)]
        words = f"{self.want.version} already" if not legs else ""
        for kind, hops in legs:
            joint = "" if not words else ", " if kind is HopKind.RENAME else ", then "
            words += joint + _leg_in_words(kind, len(hops), hops[-1].weights)
        return f"{words} ({_size_in_words(self.bytes)})"


def plan_route(manifests: Iterable[WeightManifest], have: str | None, want: str) -> Route:
    """The way with the fewest bytes, and of several the one with the fewest hops.

    `have` and `want` are weights_ids; `have` is None for a replica that holds nothing, and weights that no manifest
    names count as nothing. Publications of another run or model than the wanted weights' are never used.

    Raises:
        NoRouteError: no publications lead to the wanted weights.
    """
    listed = list(manifests)
    known = {weights.weights_id: weights for weights in _ends(listed)}
    if want not in known:
        raise NoRouteError(f"no way to weights {want[:16]}: no publication names them; the store holds {_contents(listed)}")
    held, wanted = known.get(have) if have else None, known[want]
    usable = [item for item in listed if all((end.run, end.model) == (wanted.run, wanted.model) for end in _ends([item]))]
    hops = _shortest(usable, held, wanted)
    if hops is None:
        raise NoRouteError(_no_way(usable, held, wanted))
    return Route(wanted, hops)


def _ends(manifests: Iterable[WeightManifest]) -> Iterator[WeightIdentity]:
    """Weights that publications lead to, or from."""
    for manifest in manifests:
        yield manifest.identity
        if manifest.base is not None:
            yield manifest.base.identity


def _shortest(manifests: list[WeightManifest], held: WeightIdentity | None, wanted: WeightIdentity) -> tuple[Hop, ...] | None:
    """Dijkstra's algorithm; a snapshot leads from nothing (None), which everybody has, too."""
    leaving = defaultdict(list)
    for start, hop in _all_hops(manifests):
        leaving[start].append(hop)
    order = count()  # decides between equals, since weights have no order
    nothing: tuple[Hop, ...] = ()
    reached = [(0, 0, next(order), weights, nothing) for weights in dict.fromkeys((held, None))]
    done: set[WeightIdentity | None] = set()
    while reached:
        cost, length, _, weights, hops = heappop(reached)
        if weights == wanted:
            return hops
        if weights in done:
            continue
        done.add(weights)
        for hop in leaving[weights]:
            heappush(reached, (cost + hop.size_bytes, length + 1, next(order), hop.weights, (*hops, hop)))
    return None


def _all_hops(manifests: list[WeightManifest]) -> Iterator[tuple[WeightIdentity | None, Hop]]:
    """Every possible hop, with the weights (None: nothing) that it starts from."""
    for manifest in manifests:
        target = manifest.identity
        if manifest.base is None:
            yield None, Hop(HopKind.SNAPSHOT, target, manifest)
            continue
        base = manifest.base.identity
        yield base, Hop(HopKind.APPLY, target, manifest)
        if manifest.invertible:
            yield target, Hop(HopKind.UNDO, base, manifest)
    same_bits = defaultdict(list)
    for weights in dict.fromkeys(_ends(manifests)):
        same_bits[weights.dtype, weights.checksum].append(weights)
    for names in same_bits.values():
        yield from ((one, Hop(HopKind.RENAME, other)) for one, other in permutations(names, 2))


def _no_way(manifests: list[WeightManifest], held: WeightIdentity | None, wanted: WeightIdentity) -> str:
    ends = sorted(set(_ends(manifests)) - {wanted}, key=lambda weights: weights.version)
    leading = [str(weights.version) for weights in ends if _shortest(manifests, weights, wanted) is not None]
    reached_from = (
        f"nothing leads to it but {', '.join(leading)}, of which no snapshot is left" if leading else "nothing leads to it"
    )
    return (
        f"no way from {'nothing' if held is None else held.version} to {wanted.version}: {reached_from}; "
        f"the store holds {_contents(manifests)}; a snapshot of {wanted.version} mends it"
    )


def _contents(manifests: list[WeightManifest]) -> str:
    """The newest few publications, for a message."""
    names = [
        f"snapshot {item.version}" if item.base is None else f"delta {item.base.version} to {item.version}"
        for item in sorted(manifests, key=lambda item: item.version, reverse=True)
    ]
    if len(names) > LISTED:
        names[LISTED:] = [f"{len(names) - LISTED} older ones"]
    return ", ".join(names) or "nothing"


def _leg_in_words(kind: HopKind, hops: int, weights: WeightIdentity) -> str:
    deltas = f"{hops} delta{'s' if hops > 1 else ''}"
    match kind:
        case HopKind.SNAPSHOT:
            return f"snapshot {weights.version}"
        case HopKind.APPLY:
            return f"{deltas} to {weights.version}"
        case HopKind.UNDO:
            return f"{deltas} undone to {weights.version}"
        case HopKind.RENAME:
            return f"the same weights as {weights.version}"


def _size_in_words(size_bytes: int) -> str:
    """Three digits or so: "0 B", "1.2 MB", "18 GB"."""
    size, unit = float(size_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{size:.1f} {unit}" if unit != "B" and size < 9.95 else f"{size:.0f} {unit}"
