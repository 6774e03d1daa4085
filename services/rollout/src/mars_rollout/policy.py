"""Which weights a replica serves: pulled when HEAD changes, changed when no group in hand is against it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from enum import Enum, auto
from pathlib import Path
from typing import Literal

from mars_rollout.engine.base import BASE_WEIGHTS_ID, Engine
from mars_rollout.metrics import count_update
from mars_shared.contracts import PolicyVersion, Prompt, WeightManifest
from mars_shared.errors import InputError, IntegrityError, NotReadyError
from mars_shared.faults import fault
from mars_shared.weights import WeightsStore, model_fingerprint

logger = logging.getLogger(__name__)

POLL_S = 0.2
"""How often HEAD, a small file, is read."""
COMPLAINT_S = 1.0
"""Pause between looks at a snapshot that is damaged."""
ANNOUNCEMENT_S = 60.0
"""How long a prompt may wait for its version to appear in the weights store."""


class SupersededError(InputError):
    """The prompt belongs to an incarnation of the trainer that has ended; nobody waits for its group."""


class _Verdict(Enum):
    READY = auto()
    PULL = auto()
    WAIT = auto()


class Policy:
    """The weights store's HEAD and the engine's weights, brought together.

    Groups `hold` the version they are made with; a change waits until none is held. With `in_flight`
    "continue" it waits for those alone that do not tolerate it; the others go on over it, which their
    version spans show, as do ad-hoc requests, which hold nothing.
    """

    def __init__(self, engine: Engine, store: WeightsStore, model: Path, *, in_flight: Literal["drain", "continue"]) -> None:
        self._engine = engine
        self._store = store
        self._fingerprint = model_fingerprint(model)
        self._in_flight = in_flight
        self._held: list[Prompt] = []
        self._changed = asyncio.Condition()
        self.fault: IntegrityError | None = None
        """Why the announced weights cannot be applied; the replica is of no use then."""
        self.damage: str | None = None
        """What is wrong with the announced snapshot's files, until the trainer has mended it."""

    @property
    def current(self) -> bool:
        """Whether the engine serves HEAD, or the base model while there is no HEAD."""
        head = self._store.head()
        return head is None or head.weights_id == self._engine.weights_id

    @property
    def announced(self) -> bool:
        """Whether the trainer has published any version."""
        return self._store.head() is not None

    async def follow(self) -> None:
        """Apply every announced version as soon as no held group is against it; runs until cancelled."""
        while True:
            if not self.current:
                async with self._changed:
                    if not self.current and self._may_change():
                        await self._apply_head()
            await asyncio.sleep(POLL_S)

    @asynccontextmanager
    async def hold(self, prompt: Prompt) -> AsyncIterator[float]:
        """Bring the engine to a version that the prompt tolerates and keep it so; yields the seconds that pulling took.

        Raises:
            SupersededError: the prompt is of an older incarnation than HEAD's.
            InputError: HEAD is newer than the prompt tolerates.
            NotReadyError: the prompt's version is not announced in time.
            IntegrityError: the announced weights cannot be applied.
        """
        pull_s = await self._acquire(prompt)
        try:
            yield pull_s
        finally:
            self._held.remove(prompt)  # before the lock is waited for: a cancellation then must not leave it held for ever
            async with self._changed:
                self._changed.notify_all()

    async def _acquire(self, prompt: Prompt) -> float:
        pull_s = 0.0
        deadline_s = time.monotonic() + ANNOUNCEMENT_S
        async with self._changed:
            while (verdict := self._judge(prompt)) is not _Verdict.READY:
                if verdict is _Verdict.PULL and self._may_change():
                    pull_s += await self._apply_head()
                    continue
                if verdict is _Verdict.WAIT and time.monotonic() > deadline_s:
                    raise NotReadyError(
                        f"prompt {prompt.prompt_id}: version {prompt.policy_version} was not announced in {ANNOUNCEMENT_S:g} s"
                    )
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S):
                        await self._changed.wait()
            self._held.append(prompt)
        return pull_s

    def _may_change(self) -> bool:
        """Whether HEAD may take the place of what is served; the lock is held."""
        head = self._store.head()
        if self._in_flight == "drain" or head is None:
            return not self._held
        return all(tolerates(prompt, head.version) for prompt in self._held)

    def _judge(self, prompt: Prompt) -> _Verdict:
        wanted, head = prompt.policy_version, self._store.head()
        if wanted is None:
            return _Verdict.READY
        if head is None:
            return _Verdict.WAIT
        if wanted.incarnation < head.version.incarnation:
            raise SupersededError(f"prompt {prompt.prompt_id}: version {wanted} is of an older incarnation than {head.version}")
        if tolerates(prompt, head.version):
            # Nothing begins on old weights while newer ones that will do are announced.
            return _Verdict.READY if self._engine.weights_id == head.weights_id else _Verdict.PULL
        if self._engine.weights_id != BASE_WEIGHTS_ID and tolerates(prompt, self._engine.version):
            return _Verdict.READY
        if head.version > wanted:
            raise InputError(
                f"prompt {prompt.prompt_id}: asks for version {wanted} with max_staleness {prompt.max_staleness}, "
                f"but {head.version} is current"
            )
        return _Verdict.WAIT

    async def _apply_head(self) -> float:
        """Verify and apply HEAD; returns the seconds it took. The lock is held and HEAD may be applied.

        Cancelled, it ends only when the change is whole: an engine with half-changed weights is of no use.
        """
        applying = asyncio.create_task(self._apply())
        try:
            return await asyncio.shield(applying)
        except asyncio.CancelledError:
            await asyncio.wait({applying})
            raise

    async def _apply(self) -> float:
        start_s = time.perf_counter()
        head = self._store.head()
        assert head is not None
        self._check_model(head)
        try:
            folder = await asyncio.to_thread(self._store.verify, head)
        except IntegrityError as error:
            await self._complain(head, error)
            return time.perf_counter() - start_s
        fault("rollout.before_update")
        await self._engine.update(head, folder)
        fault("rollout.after_update")
        self.damage = None
        seconds = time.perf_counter() - start_s
        count_update(head.version, seconds)
        logger.info("serving version %s after %.3f s", head.version, seconds)
        return seconds

    def _check_model(self, head: WeightManifest) -> None:
        if head.model != self._fingerprint:
            self.fault = IntegrityError(
                f"weights {head.version} are of a model with fingerprint {head.model}; this replica has {self._fingerprint}"
            )
            raise self.fault

    async def _complain(self, head: WeightManifest, error: IntegrityError) -> None:
        """HEAD cannot be read: the trainer, which has it in memory, writes it again; what was served is served on."""
        if self._store.head() != head:
            logger.info("version %s was replaced while it was read", head.version)
            return
        if self.damage != str(error):
            self.damage = str(error)
            logger.error("%s; waiting until the trainer has written it again", error)
        self._store.complain(head)
        await asyncio.sleep(COMPLAINT_S)


def tolerates(prompt: Prompt, served: PolicyVersion) -> bool:
    """Whether that version may answer the prompt: its own or up to `max_staleness` steps newer, never an older one.

    A prompt without a version tolerates no change while it is answered.
    """
    wanted = prompt.policy_version
    if wanted is None or wanted.incarnation != served.incarnation:
        return False
    return 0 <= served.step - wanted.step <= prompt.max_staleness
