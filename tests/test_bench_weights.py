"""The benchmark of sending weights: its rows are whole, its replicas exact, and a delta is the least to send."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weights.codecs import CODECS, WeightCodec
from weights.rows import STAGES, Row, promises
from weights.stall import stalls

KEYS = {
    *("task", "params", "lr", "codec", "versions", "changed", "bytes_per_param", "exact", "seconds"),
    *("diff_encode_gb_s", "decode_apply_gb_s", "stall_ms", "write_ms", "rollback", "joiner"),
}


@pytest.fixture(scope="module")
def rows(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of a quick run, by the command that `make bench-weights` calls."""
    out = tmp_path_factory.mktemp("bench") / "weights.json"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MARS_")}
    command = [sys.executable, root / "benchmarks" / "bench_weights.py", "--quick", "--out", out]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" delta ") == 3, "a line of the table per learning rate"
    assert "kept: every receiver of every codec holds the very bits" in done.stdout
    return json.loads(out.read_text())  # type: ignore[no-any-return]


def test_there_is_a_row_for_every_learning_rate_and_codec(rows: list[dict[str, Any]]) -> None:
    cases = [(row["lr"], row["codec"]) for row in rows]
    assert cases == [(lr, codec.name) for lr in (1e-6, 1e-5, 1e-4) for codec in CODECS]
    assert all(row.keys() == KEYS and row["seconds"].keys() >= set(STAGES) for row in rows)
    assert {(row["task"], row["stall_ms"], row["write_ms"]) for row in rows} == {("training", None, None)}


def row(**changes: Any) -> Row:
    named = {
        "task": "training",
        "params": 22_000_000,
        "lr": 1e-6,
        "codec": "delta",
        "versions": 50,
        "changed": 0.01,
        "exact": True,
    }
    measured = {"bytes_per_param": 0.06, "diff_encode_gb_s": 1.5, "decode_apply_gb_s": 3.0, "stall_ms": 170.0, "write_ms": 100.0}
    return Row(**named, **{**measured, **changes}, seconds={})


@pytest.mark.parametrize(
    "broken",
    [{}, {"bytes_per_param": 0.061}, {"diff_encode_gb_s": 1.49}, {"decode_apply_gb_s": 2.9}, {"stall_ms": 170.1}],
    ids=str,
)
def test_a_promise_that_is_not_kept_is_named(broken: dict[str, float]) -> None:
    assert [kept for _, kept in promises([row(**broken)])].count(False) == len(broken)


def test_every_replica_holds_the_very_bits_however_it_came(rows: list[dict[str, Any]]) -> None:
    assert all(row["exact"] for row in rows)
    first = next(row for row in rows if row["codec"] == "delta" and row["lr"] == 1e-6)
    assert first["rollback"].startswith("2 deltas undone to 1.0")
    assert first["joiner"].startswith("snapshot 1.0, then 2 deltas to 1.2")


def test_a_delta_is_the_least_to_send_and_more_is_sent_where_more_changes(rows: list[dict[str, Any]]) -> None:
    sizes: defaultdict[float, dict[str, float]] = defaultdict(dict)
    for row in rows:
        sizes[row["lr"]][row["codec"]] = row["bytes_per_param"]
    assert all(min(by_codec, key=by_codec.__getitem__) == "delta" for by_codec in sizes.values())
    assert sizes[1e-6]["delta"] < sizes[1e-5]["delta"] < sizes[1e-4]["delta"] < sizes[1e-4]["full"] == 2.0
    for row in rows:
        if row["codec"] == "index_value":  # 4 bytes of place and 2 of value
            assert row["bytes_per_param"] == pytest.approx(6 * row["changed"], rel=0.2)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_every_codec_brings_receiver_and_senders_copy_to_the_new_bits(codec: WeightCodec) -> None:
    random = np.random.default_rng(0)
    old = random.integers(0, 1 << 16, 5_000, np.uint16)
    new = old.copy()
    new[::7] += np.uint16(3)
    copy, receiver = old.copy(), old.copy()
    sent = codec.send(copy, new)
    codec.receive(receiver, sent.parts)
    assert (copy == new).all() and (receiver == new).all()
    assert len(codec.payload(sent.parts)) > 0 and min(sent.diff_s, sent.encode_s) >= 0


def test_a_stall_is_what_the_longest_pause_at_an_update_has_above_the_usual_one() -> None:
    # Pauses: 1, 1, 6, 1, 1, 3, 1. The update of 2.5 to 7 overlaps the one of 6, the update of 10.5 to 12 the one of 3.
    times = [0.0, 1.0, 2.0, 8.0, 9.0, 10.0, 13.0, 14.0]
    assert stalls(times, [(2.5, 7.0), (10.5, 12.0)]) == [5.0, 2.0]


def test_an_update_without_a_pause_of_its_own_stalls_nothing() -> None:
    assert stalls([0.0, 1.0, 2.0, 3.0], [(1.2, 1.3)]) == [0.0]
