"""Which publications of a weights store somebody may still need."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from mars_shared.contracts import WeightManifest, WeightsKind
from mars_shared.errors import NoRouteError
from mars_shared.weights.route import plan_route


def still_needed(
    manifests: Collection[WeightManifest], head: WeightManifest | None, served: Iterable[str | None], keep_snapshots: int
) -> set[str]:
    """Folder names of the publications to keep; see `WeightsStore.prune` for the rules.

    Args:
        served: weights_id of what each living reader serves; None for nothing.
    """
    snapshots = sorted((m for m in manifests if m.kind is WeightsKind.SNAPSHOT), key=lambda m: m.version, reverse=True)
    deltas = [m for m in manifests if m.kind is WeightsKind.DELTA]
    kept = snapshots[:keep_snapshots]
    kept += [delta for delta in deltas if not kept or delta.version > kept[-1].version]
    if head is not None:
        kept += [m for m in manifests if m.weights_id == head.weights_id]
        kept += _way(manifests, None, head.weights_id)
        for weights_id in {w for w in served if w is not None}:
            way = _way(deltas, weights_id, head.weights_id)
            if not snapshots or sum(m.size_bytes for m in way) <= snapshots[0].size_bytes:
                kept += way
    return {m.folder_name for m in kept}


def _way(manifests: Iterable[WeightManifest], have: str | None, want: str) -> list[WeightManifest]:
    """The publications of the cheapest route; none where there is no route."""
    try:
        route = plan_route(manifests, have, want)
    except NoRouteError:
        return []
    return [hop.manifest for hop in route.hops if hop.manifest is not None]
