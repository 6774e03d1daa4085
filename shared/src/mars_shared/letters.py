"""What a run's dead letters are about, and which of them can be tried again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from pydantic import ValidationError

from mars_shared.contracts import Prompt, Purpose, RolloutGroup
from mars_shared.contracts.base import Contract
from mars_shared.errors import InputError
from mars_shared.queue import DeadLetter, Streams


class FaultyRow(Contract):
    """A row of the data that never became a prompt; the letter's detail names file, row and field."""

    dispatch_index: int
    purpose: str


@dataclass(frozen=True)
class Letter:
    """A dead letter of a run, and what can be read of its item."""

    run: str
    raw: DeadLetter

    @property
    def id(self) -> str:
        return self.raw.entry_id

    @property
    def stage(self) -> str:
        """The stream in which it died, without the run: prompts, retries, rollouts or scored:<purpose>."""
        return self.raw.stream.removeprefix(f"mars:{self.run}:")

    @cached_property
    def item(self) -> Prompt | RolloutGroup | None:
        """What was given up; None if it cannot be read."""
        streams = Streams(self.run)
        kinds: dict[str, type[Prompt] | type[RolloutGroup]] = {
            streams.prompts: Prompt,
            streams.retries: Prompt,
            streams.rollouts: RolloutGroup,
        }
        kind = kinds.get(self.raw.stream)
        try:
            return kind.model_validate_json(self.raw.payload) if kind else None
        except ValidationError:
            return None

    @property
    def prompt(self) -> Prompt | None:
        """The prompt that was given up, or whose group was; None if it cannot be read."""
        return self.item.prompt if isinstance(self.item, RolloutGroup) else self.item

    @cached_property
    def faulty_row(self) -> FaultyRow | None:
        """The row that it is about, if it never became a prompt."""
        if self.stage != "dead":
            return None
        try:
            return FaultyRow.model_validate_json(self.raw.payload)
        except ValidationError:
            return None

    def obstacle(self) -> str | None:
        """Why it cannot be tried again; None if it can."""
        prompt = self.prompt
        if self.faulty_row is not None:
            return (
                f"dead letter {self.id}: its row never became a prompt ({self.raw.detail}); mend the row and start the run "
                "again, then its next epoch asks it; `mars dead drop` removes the letter"
            )
        if prompt is None:
            return (
                f"dead letter {self.id}: its item cannot be read, so there is no prompt to ask again; `mars dead drop` removes it"
            )
        if prompt.purpose is not Purpose.TRAIN:
            return (
                f"dead letter {self.id}: its purpose is {prompt.purpose.value}, and only training prompts can be tried again; "
                "the others are asked anew by themselves"
            )
        return None

    def retry_payload(self) -> bytes:
        """The prompt as the trainer takes it up again.

        Raises:
            InputError: it cannot be tried again.
        """
        if obstacle := self.obstacle():
            raise InputError(obstacle)
        assert self.prompt is not None
        return self.prompt.model_dump_json().encode()
