"""Which weights a replica serves: pulled when another version is announced, changed when no group in hand is against it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Literal

from mars_rollout.admission import Served, Verdict, judge, tolerates
from mars_rollout.engine.base import BASE_WEIGHTS_ID, Engine
from mars_rollout.metrics import count_refused, count_stages, count_update
from mars_rollout.pull import Arrival, Puller
from mars_shared.contracts import Prompt, WeightManifest
from mars_shared.errors import IntegrityError, NotReadyError, WeightsUnavailableError
from mars_shared.faults import fault
from mars_shared.weights import model_fingerprint
from mars_shared.weights.source import WeightSource

logger = logging.getLogger(__name__)

POLL_S = 0.2
"""How often the source is asked what is announced."""
COMPLAINT_S = 1.0
"""Pause between looks at a snapshot that is damaged."""
ANNOUNCEMENT_S = 60.0
"""How long a prompt may wait for its version to appear in the weights store."""


class Policy:
    """The announced weights, the mirror's and the engine's, brought together.

    Groups `hold` the version they are made with; a change waits until none is held. With `in_flight`
    "continue" it waits for those alone that do not tolerate it; the others go on over it, which their
    version spans show, as do ad-hoc requests, which hold nothing. Fetching and decoding wait for nobody.

    An announced version that does not verify, is older than what is served, or is of another model is refused:
    what was served is served on.
    """

    def __init__(
        self, engine: Engine, source: WeightSource, puller: Puller, model: Path, *, in_flight: Literal["drain", "continue"]
    ) -> None:
        self._engine = engine
        self._source = source
        self._puller = puller
        self._fingerprint = model_fingerprint(model)
        self._in_flight = in_flight
        self._head: WeightManifest | None = None
        self._looked = False
        self._refused: str | None = None
        self._complained: str | None = None
        self._held: list[Prompt] = []
        self._changed = asyncio.Condition()
        self.fault: IntegrityError | None = None
        """Why a replica that never served an announced version cannot; it is of no use then."""
        self.damage: str | None = None
        """What is wrong with the announced version, until it can be applied."""
        self.arrival = "the model folder's own weights"
        """How the served version was reached."""

    @property
    def current(self) -> bool:
        """Whether the engine serves the announced version, or the base model while there is none."""
        return self._looked and (self._head is None or self._head.weights_id == self._engine.weights_id)

    @property
    def announced(self) -> bool:
        """Whether the trainer has published any version."""
        return self._head is not None

    async def look(self) -> None:
        """Learn what is announced; a source that does not answer leaves things as they were."""
        try:
            self._head = await self._source.head()
            self._looked = True
        except IntegrityError as error:
            if self._say(str(error)):
                count_refused("damaged")
        except WeightsUnavailableError as error:
            self._say(str(error))

    async def follow(self) -> None:
        """Fetch every announced version, and apply it as soon as no held group is against it; runs until cancelled."""
        registered = asyncio.create_task(self._stay_registered())
        try:
            while not registered.done():  # it ends by a failure alone
                await self.look()
                if not self.current:
                    await self._follow_head()
                await asyncio.sleep(POLL_S)
            registered.result()
        finally:
            registered.cancel()

    async def _stay_registered(self) -> None:
        """Beside fetches, which may take longer than silence is suffered."""
        while True:
            await self._puller.stay_registered()
            await asyncio.sleep(POLL_S)

    @asynccontextmanager
    async def hold(self, prompt: Prompt) -> AsyncIterator[float]:
        """Bring the engine to a version that the prompt tolerates and keep it so; yields the seconds that pulling took.

        Raises:
            SupersededError: the prompt is of an older incarnation than the announced one.
            InputError: the announced version is newer than the prompt tolerates.
            NotReadyError: the prompt's version is not announced in time.
            IntegrityError: the announced weights are of another model.
        """
        pull_s = await self._acquire(prompt)
        try:
            yield pull_s
        finally:
            self._held.remove(prompt)  # before the lock is waited for: a cancellation then must not leave it held for ever
            async with self._changed:
                self._changed.notify_all()

    async def verify(self) -> None:
        """Compare the served weights with the mirror, and the mirror with its checksums, in full.

        Raises:
            IntegrityError: which tensors differ.
            NotReadyError: another version is on its way, or the engine serves the model folder's own weights.
        """
        async with self._changed, self._puller.verified() as (weights_id, files):
            if weights_id != self._engine.weights_id:
                raise NotReadyError("no announced version is served, or another one is on its way; ask again")
            await self._engine.compare(files)

    async def _acquire(self, prompt: Prompt) -> float:
        pull_s = 0.0
        deadline_s = time.monotonic() + ANNOUNCEMENT_S
        async with self._changed:
            while (verdict := await self._judge(prompt)) is not Verdict.READY:
                if verdict is Verdict.PULL and self._may_change():
                    pull_s += await self._apply_head()
                    if self.current:
                        continue
                if verdict is Verdict.WAIT and time.monotonic() > deadline_s:
                    raise NotReadyError(
                        f"prompt {prompt.prompt_id}: version {prompt.policy_version} was not announced, or cannot be served, "
                        f"for {ANNOUNCEMENT_S:g} s; {self.damage or 'the source says nothing is wrong'}"
                    )
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S):
                        await self._changed.wait()
            self._held.append(prompt)
        return pull_s

    def _may_change(self) -> bool:
        """Whether the announced version may take the place of what is served; the lock is held."""
        head = self._head
        if self._in_flight == "drain" or head is None:
            return not self._held
        return all(tolerates(prompt, head.version) for prompt in self._held)

    async def _judge(self, prompt: Prompt) -> Verdict:
        if prompt.policy_version is not None:
            await self.look()
            if self.fault is not None:
                raise self.fault
        served = Served(self._engine.version, self._engine.weights_id)
        return judge(prompt, self._head, served, refused=self._refused)

    def _acceptable(self, head: WeightManifest) -> bool:
        """Whether the announced version may be fetched at all.

        Raises:
            IntegrityError: it is of another model, and this replica never served any other.
        """
        serves_announced = self._engine.weights_id != BASE_WEIGHTS_ID
        if head.model != self._fingerprint:
            error = IntegrityError(
                f"weights {head.version} are of a model with fingerprint {head.model}; this replica has {self._fingerprint}"
            )
            if not serves_announced:
                self.fault = error
                raise error
            self._refuse(head, "model", str(error))
            return False
        if serves_announced and head.version <= self._engine.version and head.weights_id != self._engine.weights_id:
            self._refuse(head, "replayed", f"weights {head.version} are announced although {self._engine.version} were before")
            return False
        return True

    async def _follow_head(self) -> None:
        """Bring the mirror to the announced version while the engine goes on with what it has; then the engine, if it may."""
        async with self._arrived(self._head) as arrival:
            pass
        if arrival is None:
            return
        async with self._changed:
            if not self.current and self._may_change():
                await self._apply_head()

    async def _apply_head(self) -> float:
        """Fetch, verify and apply the announced version; returns the seconds it took. The lock is held.

        Cancelled, it ends only when the change is whole: an engine with half-changed weights is of no use.
        """
        applying = asyncio.create_task(self._apply())
        try:
            return await asyncio.shield(applying)
        except asyncio.CancelledError:
            await asyncio.wait({applying})
            raise

    async def _apply(self) -> float:
        began, head = time.perf_counter(), self._head
        async with self._arrived(head) as arrival:
            if head is not None and arrival is not None:
                await self._update(head, arrival)
        return time.perf_counter() - began

    async def _update(self, head: WeightManifest, arrival: Arrival) -> None:
        fault("rollout.before_update")
        try:
            seconds = await self._engine.update(head, arrival.files)
        except IntegrityError as error:
            self._refuse(head, "engine", str(error))
            return
        fault("rollout.after_update")
        self.damage, self.arrival = None, arrival.how
        count_stages(seconds)
        count_update(head.version)
        logger.info("serving version %s: %s", head.version, arrival.how)

    @asynccontextmanager
    async def _arrived(self, head: WeightManifest | None) -> AsyncIterator[Arrival | None]:
        """The mirror with that version in it, which stays so inside; None if it cannot be brought there."""
        if head is None or head.weights_id == self._refused or not self._acceptable(head):
            yield None
            return
        async with AsyncExitStack() as stack:
            try:
                arrival = await stack.enter_async_context(self._puller.at(head))
            except IntegrityError as error:
                await self._complain(head, error)
                arrival = None
            except WeightsUnavailableError as error:
                self._say(str(error))
                arrival = None
            except OSError as error:
                self._say(
                    f"weights {head.version} cannot be kept in the scratch folder ({error}); make room, or set weights.scratch"
                )
                arrival = None
                await asyncio.sleep(COMPLAINT_S)
            yield arrival

    def _refuse(self, head: WeightManifest, reason: str, why: str) -> None:
        """Never look at this version again: nothing would make it good."""
        if head.weights_id != self._refused:
            self._refused = head.weights_id
            count_refused(reason)
            self._say(f"{why}; {self._engine.version} is served on")

    async def _complain(self, head: WeightManifest, error: IntegrityError) -> None:
        """It cannot be reached: the trainer, which has it in memory, writes a snapshot; what was served is served on."""
        await self.look()
        if self._head != head:
            logger.info("version %s was replaced while it was read", head.version)
            return
        if head.weights_id != self._complained:
            self._complained = head.weights_id
            count_refused("unreachable")
        self._say(f"{error}; waiting until the trainer has written it again")
        with suppress(WeightsUnavailableError):
            await self._source.complain(head)
        await asyncio.sleep(COMPLAINT_S)

    def _say(self, problem: str) -> bool:
        """Log what is wrong, once; whether it is new."""
        new = self.damage != problem
        if new:
            self.damage = problem
            logger.error("%s", problem)
        return new
