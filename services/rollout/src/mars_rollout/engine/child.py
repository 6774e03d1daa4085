"""Where the engine's process begins: watching its parent and logging like it, before vLLM is imported and long before it runs."""

from __future__ import annotations

import multiprocessing
from typing import Any

from mars_rollout.engine.environment import limit_vllm_lines
from mars_rollout.lifeline import die_with_parent
from mars_shared.logs import inherit_logging

if multiprocessing.current_process().name != "MainProcess":
    # A spawned process looks its target up first; what comes next, vLLM's imports, takes many seconds.
    die_with_parent()
    inherit_logging()
    limit_vllm_lines()


def run_engine_core(*args: Any, **kwargs: Any) -> None:
    """Target of the engine's process: vLLM's own, which by itself outlives a parent that was killed."""
    from vllm.v1.engine.core import EngineCoreProc

    inherit_logging()  # once more: importing vLLM has raised levels
    EngineCoreProc.run_engine_core(*args, **kwargs)
