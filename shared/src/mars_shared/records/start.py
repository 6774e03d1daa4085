"""What a start of the trainer was: the `started` event, from which reports tell recipe, versions and host."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from mars_shared.contracts.base import Contract


class Host(Contract):
    """The machine of the trainer, without its name."""

    platform: str = Field(description='operating system and architecture, e.g. "Linux-6.1.0-x86_64-with-glibc2.36"')
    cpu: str = Field(description="model, as the system calls it")
    cores: int = Field(ge=1, description="that the trainer may use")
    gpus: tuple[str, ...] = Field(default=(), description="models of those that the trainer sees")


class RunStart(Contract):
    """One incarnation's start."""

    incarnation: int = Field(ge=1)
    recipe: dict[str, dict[str, Any]] = Field(description="every setting by section, as it was resolved; secrets in URLs masked")
    model: str | None = Field(
        default=None, description="hash of the model folder's configuration and weights; None: not recorded"
    )
    versions: dict[str, str] = Field(description='of Python and of the packages that a run stands on, e.g. {"torch": "2.9.1"}')
    host: Host

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe by dotted names, e.g. {"train.steps": 150}."""
        return {f"{section}.{key}": value for section, keys in self.recipe.items() for key, value in keys.items()}
