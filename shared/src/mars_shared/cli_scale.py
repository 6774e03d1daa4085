"""`mars scale rollout=N`: more or fewer replicas of a running stack."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mars_shared.errors import ConfigError, MarsError
from mars_shared.scale import ScaleRequest, check_replicas
from mars_shared.stack import StackState, find_stack, read_state
from mars_shared.supervisor import GRACE_S

console = Console()
POLL_S = 0.1
WAIT_S = GRACE_S + 40.0
"""For replicas that end within their grace, and a supervisor that is busy with the others meanwhile."""


def scale(
    change: Annotated[str, typer.Argument(help="how many replicas are wanted, e.g. rollout=3", metavar="rollout=N")],
    run_dir: Annotated[Path | None, typer.Argument(help="a run folder; default: of the one stack in runs/* that runs")] = None,
) -> None:
    """Change the number of replicas of a running `mars up` or `mars train`, until it ends."""
    replicas = _replicas_of(change)
    folder, before = find_stack(run_dir)
    request = ScaleRequest(supervisor_pid=before.supervisor_pid, replicas=replicas)
    request.write(folder)
    after = _wait_settled(folder, request)
    _say_done(before, after)
    if after.given_up:
        raise MarsError("\n".join(f"{name} could not be added: {reason}" for name, reason in after.given_up.items()))


def _replicas_of(change: str) -> int:
    """The N of "rollout=N". Raises ConfigError if that is not what it is."""
    match = re.fullmatch(r"rollout=(\d{1,9})", change, re.ASCII)
    if match is None:
        raise ConfigError(f"{change!r}: expected rollout=N with a whole number N, e.g. rollout=3; only replicas can be scaled")
    check_replicas(int(match[1]))
    return int(match[1])


def _wait_settled(run_dir: Path, request: ScaleRequest) -> StackState:
    """The stack's state once nothing of the request is left to do.

    Raises:
        ConfigError: the stack ended meanwhile.
        MarsError: WAIT_S are over.
    """
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        state = read_state(run_dir)
        if state is None or state.supervisor_pid != request.supervisor_pid:
            raise ConfigError(f"the stack in {run_dir} ended before it had {request.replicas} replica(s)")
        if state.settled_request == request.id:
            return state
        time.sleep(POLL_S)
    raise MarsError(
        f"process {request.supervisor_pid}, which runs {run_dir}, has not made it {request.replicas} replica(s) within {WAIT_S:g} s: "
        "it hangs, a replica does not end, or another `mars scale` came later; see its output and `mars status`"
    )


def _say_done(before: StackState, after: StackState) -> None:
    started, ended = after.replicas.keys() - before.replicas.keys(), before.replicas.keys() - after.replicas.keys()
    parts = [f"{verb} {', '.join(sorted(names))}" for verb, names in (("started", started), ("ended", ended)) if names]
    did = "; ".join(parts) or "nothing to do"
    console.print(
        f"{after.run} has {len(after.replicas)} rollout replica(s): {did}", highlight=False, markup=False, soft_wrap=True
    )
    if started:
        console.print("`mars status` shows when a started one serves", highlight=False, markup=False)
