"""When a prompt may be answered: by which versions of the policy, and what has to happen before. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from mars_rollout.engine.base import BASE_WEIGHTS_ID
from mars_shared.contracts import PolicyVersion, Prompt, WeightManifest
from mars_shared.errors import InputError


class SupersededError(InputError):
    """The prompt belongs to an incarnation of the trainer that has ended; nobody waits for its group."""


class Verdict(Enum):
    """Of a prompt, before it is answered."""

    READY = auto()
    PULL = auto()
    """The announced version has to be served first."""
    WAIT = auto()
    """A version that it can be answered by has to be announced first."""


@dataclass(frozen=True)
class Served:
    """What the engine serves."""

    version: PolicyVersion
    weights_id: str


def tolerates(prompt: Prompt, served: PolicyVersion) -> bool:
    """Whether that version may answer the prompt: its own or up to `max_staleness` steps newer, never an older one.

    A prompt without a version tolerates no change while it is answered.
    """
    wanted = prompt.policy_version
    if wanted is None or wanted.incarnation != served.incarnation:
        return False
    return 0 <= served.step - wanted.step <= prompt.max_staleness


def judge(prompt: Prompt, head: WeightManifest | None, served: Served, *, refused: str | None) -> Verdict:
    """What stands between the prompt and its answer.

    Args:
        head: the announced version; None if there is none.
        refused: identity of weights that are not served, though they are announced.

    Raises:
        SupersededError: the prompt is of an older incarnation than the announced one.
        InputError: the announced version is newer than the prompt tolerates.
    """
    wanted = prompt.policy_version
    if wanted is None:
        return Verdict.READY
    if head is None:
        return Verdict.WAIT
    if wanted.incarnation < head.version.incarnation:
        raise SupersededError(f"prompt {prompt.prompt_id}: version {wanted} is of an older incarnation than {head.version}")
    tolerable = tolerates(prompt, head.version)
    if tolerable and head.weights_id != refused:
        # Nothing begins on old weights while newer ones that will do are announced.
        return Verdict.READY if served.weights_id == head.weights_id else Verdict.PULL
    if served.weights_id != BASE_WEIGHTS_ID and tolerates(prompt, served.version):
        return Verdict.READY
    if head.version > wanted and not tolerable:
        raise InputError(
            f"prompt {prompt.prompt_id}: asks for version {wanted} with max_staleness {prompt.max_staleness}, "
            f"but {head.version} is current"
        )
    return Verdict.WAIT
