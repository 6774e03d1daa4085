"""The page of a long run: how long its requests take, and how much memory its server needs.

Writes a run folder with many groups (as the trainer writes them, from one real group with other numbers), serves it by `mars ui`,
and asks what a browser asks: lists under every kind of filter, groups with their neighbours, curves. Prints medians and
95th percentiles, and the server's peak memory; what is promised (300 ms, 300 MB at 50,000 groups) is compared at the end.

    python benchmarks/bench_page.py [--groups 50000] [--requests 300]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from subprocess import DEVNULL, Popen

import httpx
import psutil

from mars_shared.contracts import PolicyVersion, Source, TextTruth
from mars_shared.records.groups import AnswerRecord, GroupRecord, Statistics, group_facts
from mars_shared.records.segments import SegmentWriter
from mars_shared.telemetry import EventLog

PORT = 8477
PROMISED_MS, PROMISED_MB = 300.0, 300.0
GROUPS_A_STEP = 16
SOURCES = ("visible", "infrared")
THOUGHT = "The visible image is dark, the infrared one shows two warm shapes at the left edge. " * 12
FILTERS = (
    {},
    {"outcome": "conflict"},
    {"outcome": "promotion", "dataset": "scene"},
    {"outcome": "no_signal"},
    {"losing_to": "infrared", "min_step": 100},
    {"min_reward": 0.9, "max_reward": 1.1},
    {"offset": 20_000},
)


def group(index: int, chance: random.Random) -> GroupRecord:
    """A group of eight multi- and two mono-source answers of a few hundred characters each."""
    rewards = [chance.choice((0.0, 0.5, 1.0, 1.5)) for _ in range(10)]
    members = [("multi", None, i) for i in range(8)] + [("mono", name, 0) for name in SOURCES]
    multi = sum(rewards[:8]) / 8
    return GroupRecord(
        time=1.7e9 + index,
        occasion="step",
        step=index // GROUPS_A_STEP + 1,
        task_id=f"train-{index:08d}",
        prompt_id=f"{chance.choice(('scene', 'digits'))}/train/{index % 900}",
        question="How many persons are there?",
        sources=tuple(Source(name=name, blob="0" * 64, media_type="image/png") for name in SOURCES),
        truth=TextTruth(text="two"),
        answers=tuple(
            AnswerRecord(
                kind=kind,
                source=source,
                index=place,
                text=f"<think>{THOUGHT}</think><answer>{chance.randrange(9)}</answer>",
                tokens=120,
                finish_reason="stop",
                reward=reward,
                parts={"format": 0.5, "accuracy": reward - 0.5},
                parsed=True,
                boxes=(),
                advantage=reward - 0.7 if kind == "multi" else None,
            )
            for (kind, source, place), reward in zip(members, rewards, strict=True)
        ),
        statistics=Statistics(pool_mean=0.7, pool_std=0.5, signal=index % 11 != 0, trained=index % 11 != 0),
        gain=multi - sum(rewards[8:]) / 2,
        gain_by_source={name: multi - reward for name, reward in zip(SOURCES, rewards[8:], strict=True)},
        policy_version=PolicyVersion(incarnation=1, step=index // GROUPS_A_STEP),
        replica=f"rollout-{index % 4}",
        generation_s=1.5,
        reward_s=0.01,
    )


def write_run(folder: Path, groups: int) -> None:
    """A run folder as the trainer would leave it."""
    chance, log, events = random.Random(0), SegmentWriter(folder / "groups", group_facts), EventLog(folder / "events.jsonl")
    for index in range(groups):
        log.append(group(index, chance).model_dump(mode="json"))
        if index % 10_000 == 0:
            print(f"{index} of {groups} groups written", file=sys.stderr)
    for step in range(1, groups // GROUPS_A_STEP + 1):
        metrics = {name: chance.random() for name in ("reward", "gain", "kl", "entropy", "grad_norm", "conflict_rate")}
        events.write("step", step=step, steps=step, metrics=metrics, seconds={"training": 1.0, "generation": 2.0})


def wait_ready(client: httpx.Client) -> float:
    """Seconds until the first list is answered."""
    began = time.perf_counter()
    while True:
        try:
            client.get("/v1/groups").raise_for_status()
            return time.perf_counter() - began
        except httpx.TransportError:
            time.sleep(0.05)


def ask(client: httpx.Client, requests: int) -> dict[str, list[float]]:
    """Milliseconds by kind of request."""
    chance, took = random.Random(1), {"list": [], "group": [], "curves": []}  # type: dict[str, list[float]]
    for number in range(requests):
        wanted = dict(FILTERS[number % len(FILTERS)])
        listed = timed(client, "/v1/groups", wanted, took["list"]).json()["groups"]
        if listed:
            wanted.pop("offset", None)
            timed(client, "/v1/group", wanted | {"name": chance.choice(listed)["name"]}, took["group"])
        if number % 10 == 0:
            timed(client, "/v1/curves", {}, took["curves"])
    return took


def timed(client: httpx.Client, path: str, parameters: dict[str, object], into: list[float]) -> httpx.Response:
    """One request; its milliseconds are added."""
    began = time.perf_counter()
    answer = client.get(path, params=parameters).raise_for_status()  # type: ignore[arg-type]
    into.append(1e3 * (time.perf_counter() - began))
    return answer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=50_000)
    parser.add_argument("--requests", type=int, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mars-bench-page-") as folder:
        write_run(Path(folder), options.groups)
        size_mb = sum(path.stat().st_size for path in Path(folder).rglob("*")) / 1e6
        command = [Path(sys.executable).with_name("mars"), "ui", folder, "--port", str(PORT)]
        with Popen(command, stdout=DEVNULL) as server, httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=60) as client:
            try:
                print(f"{options.groups} groups, {size_mb:.0f} MB on disk; first answer after {wait_ready(client):.1f} s")
                took = ask(client, options.requests)
                memory_mb = psutil.Process(server.pid).memory_info().rss / 1e6
            finally:
                server.terminate()
    slowest = 0.0
    for name, values in took.items():
        percentile = quantiles(values, n=20)[-1]
        slowest = max(slowest, percentile)
        print(f"{name:7} {len(values):4} requests  median {median(values):6.1f} ms  95th percentile {percentile:6.1f} ms")
    print(f"server memory {memory_mb:.0f} MB")
    kept = slowest <= PROMISED_MS and memory_mb <= PROMISED_MB
    print(f"{'kept' if kept else 'BROKEN'}: at most {PROMISED_MS:.0f} ms at the 95th percentile and {PROMISED_MB:.0f} MB")
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main())
