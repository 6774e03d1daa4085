"""Settings: one TOML recipe per run says what is trained, the environment says where it runs.

`load_recipe` reads a recipe strictly: an unknown key or a wrong type is a `ConfigError`
that names file, key, what came and what was expected. Any field can be overridden from the
environment, e.g. MARS_TRAIN__STEPS=10. `Deployment` reads addresses, folders and the API
key from the environment alone.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from mars_shared.contracts import Decoding, FrameKind, SamplingSpec, View
from mars_shared.errors import ConfigError

PROBE_TOKENS = 32
"""Longest completion of the self-test's group."""
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RunSection(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="names the run's streams and metrics")
    dir: Path = Field(description="run folder: checkpoints, weights, blobs, logs, events")
    seed: int = Field(default=0, ge=0, description="of the order of samples and of every completion")


class ModelSection(Section):
    path: Path = Field(description="folder in Hugging Face format: config, tokenizer, processor, safetensors")
    dtype: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="of replicas and published weights")
    max_model_len: int = Field(ge=16, description="tokens of prompt and completion together")
    box_frame: FrameKind | None = Field(
        default=None, description="frame in which the model writes boxes; None: that of its family"
    )


class DatasetName(StrEnum):
    DIGITS = "digits"
    SCENE = "scene"


class DataFiles(Section):
    """One dataset in files; docs/data.md tells the formats."""

    path: Path = Field(description="a file, or the folder of LLVIP or of a saved Hugging Face dataset")
    name: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9_.-]+$", description="names the dataset in results; None: as its file or folder"
    )
    format: str | None = Field(default=None, description="one of those in docs/data.md; None: what the file looks like")
    split: str | None = Field(default=None, description="the part to read, for formats that have splits, e.g. train")
    images: Path | None = Field(default=None, description="folder that image paths are below; None: the dataset's own")
    sources: tuple[str, ...] | None = Field(
        default=None, description="source names in image order, for formats that name none; None: image-1, image-2, ..."
    )


class DataSection(Section):
    dataset: DatasetName | None = Field(
        default=None, description="made on the spot: trained on, and held out where `test` is empty; either this or `train`"
    )
    train: tuple[DataFiles, ...] = Field(default=(), description="files trained on: `[[data.train]]`, one or more")
    test: tuple[DataFiles, ...] = Field(default=(), description="files held out for evaluations: `[[data.test]]`")
    test_share: float = Field(
        default=0.05, gt=0, lt=1, description="share of the rows of `train` held out, by hash of their images, if `test` is empty"
    )
    source_names: tuple[str, ...] | None = Field(
        default=None, description="the sources that the policy knows, e.g. visible and infrared; others are refused. None: any"
    )
    max_faulty_share: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="of a file's rows that may be faulty: they are named in the log and become dead letters in their turn; "
        "with more the run refuses to start. 0: refuse any",
    )
    max_image_pixels: int = Field(default=4096 * 4096, ge=1, description="an image with more is refused")
    eval_samples: int = Field(
        default=256,
        ge=1,
        description="held-out samples of each dataset that an evaluation uses: of files with more rows always the same selection",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.dataset is None) == (not self.train):
            came = "neither" if self.dataset is None else "both"
            raise ValueError(f"{came} of data.dataset and data.train given; expected one of them")
        return self


class RolloutSection(Section):
    num_generations: int = Field(ge=1, description="G, multi-source completions a prompt")
    num_mono: int = Field(default=1, ge=0, description="M, mono-source completions a source")
    mono_view: View = Field(
        default=View.SINGLE,
        description="a mono-source completion sees `single`: one name and image; `repeat`: the one image K times",
    )
    mono_decoding: Decoding = Field(default=Decoding.SAMPLE, description="`greedy` needs `num_mono` 0 or 1")
    temperature: float = Field(default=1.0, gt=0, description="of sampled completions, and of the trainer's log-probabilities")
    top_p: float = Field(default=1.0, gt=0, le=1, description="nucleus of sampled completions")
    max_completion_length: int = Field(ge=1, description="tokens")
    replicas: int = Field(default=1, ge=1, description="replicas that `mars up` starts")
    concurrent_groups: int = Field(default=8, ge=1, description="groups that one replica makes at a time")
    in_flight: Literal["drain", "continue"] = Field(
        default="drain",
        description="at a weight change groups in flight are finished by the old weights first, `drain`, or, if "
        "`train.max_staleness` permits, go on under the new ones, `continue`: version spans tell which token is by which",
    )
    threads: int = Field(default=1, ge=1, description="CPU threads of a replica; ignored on GPUs")
    kv_cache_mib: int | None = Field(default=None, ge=1, description="key-value cache; None: vLLM decides (GPU)")
    gpu_memory_utilization: float = Field(
        default=0.85, gt=0, lt=1, description="share of a GPU's memory that a replica may take; ignored on CPUs"
    )

    @model_validator(mode="after")
    def _spec_is_valid(self) -> Self:
        self.spec(seed=0)
        return self

    def spec(self, seed: int) -> SamplingSpec:
        """How training groups are sampled."""
        return SamplingSpec(
            num_generations=self.num_generations,
            num_mono=self.num_mono,
            mono_view=self.mono_view,
            mono_decoding=self.mono_decoding,
            temperature=self.temperature,
            top_p=self.top_p,
            max_completion_length=self.max_completion_length,
            seed=seed,
        )

    def probe_spec(self, seed: int, *, sources: int) -> SamplingSpec:
        """How the self-test's group is sampled: few, short, from the whole vocabulary, so that both sides compute the same."""
        return self.spec(seed).model_copy(
            update={
                "num_generations": 2,
                "num_mono": int(sources > 1),
                "mono_decoding": Decoding.SAMPLE,
                "top_p": 1.0,
                "max_completion_length": min(PROBE_TOKENS, self.max_completion_length),
            }
        )

    def greedy_spec(self, seed: int) -> SamplingSpec:
        """How evaluation groups are sampled: one greedy completion of each kind and source."""
        return self.spec(seed).model_copy(
            update={
                "num_generations": 1,
                "num_mono": 1,
                "mono_decoding": Decoding.GREEDY,
                "multi_decoding": Decoding.GREEDY,
            }
        )


class RewardSection(Section):
    recipe: str = Field(
        default="paper",
        min_length=1,
        description="`paper`: of the paper's text; `released`: equal to its released code; or a function of your own: "
        "`FILE:FUNCTION` or the name of an entry point of the group mars.rewards, behind `trl:` if it has TRL's signature",
    )
    time_limit_s: float = Field(
        default=10.0,
        gt=0,
        description="CPU seconds that a custom reward may take for one completion, and by the clock ten times as long "
        "(at least 10 s); a completion that takes longer has no reward, and its group is given up",
    )


class TrainSection(Section):
    steps: int = Field(ge=1, description="optimizer steps (rollout batches) of the run")
    prompts_per_step: int = Field(ge=1, description="groups that one step trains on")
    minibatch_prompts: int | None = Field(default=None, ge=1, description="prompts an optimizer update; None: all")
    learning_rate: float = Field(gt=0, description="of AdamW, at its highest")
    warmup_steps: int = Field(default=0, ge=0, description="steps over which the learning rate rises from 0")
    lr_schedule: Literal["constant", "linear"] = Field(default="constant", description="`linear` falls to 0 at the last step")
    weight_decay: float = Field(default=0.0, ge=0, description="of AdamW")
    adam_betas: tuple[Decay, Decay] = Field(default=(0.9, 0.99), description="of AdamW")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients are scaled down to this norm")
    advantage: Literal["mars", "grpo", "dr_grpo"] = Field(
        default="mars",
        description="`mars`: normalised over multi- and mono-source rewards; `grpo`: over multi-source rewards alone; "
        "`dr_grpo`: as grpo, never divided by the std",
    )
    scale_rewards: bool = Field(default=True, description="divide advantages by the pool's std (mars, grpo)")
    epsilon: float = Field(default=0.2, ge=0, lt=1, description="lower clip")
    epsilon_high: float = Field(default=0.2, ge=0, description="upper clip")
    beta: float = Field(default=0.0, ge=0, description="weight of the k3 KL to the reference policy")
    dual_clip: float | None = Field(
        default=None, gt=1, description="c: where the advantage is negative the surrogate is at least c times it; None: no bound"
    )
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = Field(
        default="dapo",
        description="dapo: mean over the batch's tokens; grpo: mean over each completion's, then over completions; "
        "dr_grpo: sum over tokens / (completions * max_completion_length)",
    )
    importance_correction: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = Field(
        default="none",
        description="weigh by trainer's over sampler's probability, a token's or a whole completion's; "
        "a ratio above `importance_cap` is cut to it (truncate) or its tokens are left out (mask)",
    )
    importance_cap: float = Field(default=2.0, gt=1, description="bound of the importance ratio")
    dynamic_sampling: Literal["none", "pool", "multi"] = Field(
        default="none",
        description="replace groups without signal by the next prompts' groups: `pool`: all rewards that the advantages "
        "are normalised over are equal; `multi`: the multi-source rewards are",
    )
    max_generation_batches: int = Field(
        default=10,
        ge=1,
        description="with dynamic sampling: a step looks at up to this many times `prompts_per_step` groups; then it trains on what there is",
    )
    overlong_buffer: int | None = Field(
        default=None, ge=1, description="tokens before max_completion_length over which a punishment grows; None: none"
    )
    overlong_penalty: float = Field(default=1.0, ge=0, description="taken from the reward at max_completion_length")
    mask_truncated_completions: bool = Field(
        default=False, description="leave completions that hit the length limit out of the loss"
    )
    max_staleness: int = Field(
        default=0,
        ge=0,
        description="steps by which a group may be older than the policy that it trains; 0: made by that very policy. Above 0 "
        "generation goes on while the trainer works, and `importance_correction` is needed",
    )
    tokens_per_microbatch: int = Field(default=16384, ge=1, description="padded tokens of one forward pass")
    logprob_chunk_tokens: int = Field(default=1024, ge=1, description="tokens whose logits exist at a time")
    checkpoint_every: int = Field(default=10, ge=1, description="steps; groups are acknowledged then")
    keep_checkpoints: int = Field(default=2, ge=1, description="newest checkpoints kept")
    threads: int = Field(default=2, ge=1, description="CPU threads of the trainer; ignored on GPUs")


class WeightsSection(Section):
    url: str | None = Field(
        default=None,
        description="where replicas find published weights; unset: in the run folder, which they share with the trainer; "
        "http://HOST:PORT: of the trainer, which serves them; any other URL that fsspec knows (s3://bucket/run): the trainer "
        "copies them there",
    )
    snapshot_every: int = Field(
        default=10, ge=1, description="versions from one full snapshot to the next; between them deltas are published"
    )
    keep_snapshots: int = Field(
        default=2, ge=1, description="newest snapshots kept, with all later deltas and whatever a living replica needs"
    )
    verify: Literal["changed", "full"] = Field(
        default="changed",
        description="how a replica checks its weights before it serves them: from what `changed`, or all bytes in `full`",
    )
    scratch: Path | None = Field(
        default=None,
        description="folder for a replica's own copy; unset: /dev/shm if it has room, else the system's temporary folder",
    )


class EvalSection(Section):
    every: int = Field(default=0, ge=0, description="steps between evaluations during training; 0: only start and end")


class SftSection(Section):
    target: Literal["answer", "think"] = Field(
        default="think",
        description="`mars sft` imitates `answer`: the answer alone; `think`: a chain of thought, then the answer",
    )
    steps: int = Field(default=100, ge=1, description="optimizer steps of `mars sft`")
    samples_per_step: int = Field(default=32, ge=1, description="samples that one of its steps trains on")
    learning_rate: float = Field(default=1e-5, gt=0, description="of its AdamW; constant after the warm-up")
    warmup_steps: int = Field(default=10, ge=0, description="steps over which its learning rate rises from 0")


TrackerName = Literal["tensorboard", "wandb"]
"""A tracker is named as the package that it needs."""


class TrackSection(Section):
    trackers: tuple[TrackerName, ...] = Field(
        default=("tensorboard",), description="where curves and samples are shown besides the run folder (docs/trackers.md)"
    )
    project: str = Field(default="mars", min_length=1, description="of W&B, to which the run belongs")
    samples_every: int = Field(
        default=50,
        ge=1,
        description="steps from one table and picture of training groups to the next; evaluations always have them",
    )
    samples: int = Field(default=4, ge=0, description="groups in such a table and picture; 0: none")

    @field_validator("trackers")
    @classmethod
    def _each_once(cls, names: tuple[TrackerName, ...]) -> tuple[TrackerName, ...]:
        if len(set(names)) < len(names):
            raise ValueError("a tracker is named twice; expected each once")
        return names


class SelfTestSection(Section):
    enabled: bool = Field(
        default=True, description="before the first step, check on one group that sampler and trainer agree, or refuse to start"
    )
    max_logprob_difference: float | None = Field(
        default=None,
        gt=0,
        description="largest difference of a token's log-probability, nats; unset: 0.001 in float32 (0.05 with a trainer on a "
        "GPU), 1.0 in bfloat16",
    )
    mean_logprob_difference: float | None = Field(
        default=None,
        gt=0,
        description="mean of these differences, nats; unset: 0.0001 in float32 (0.01 with a trainer on a GPU), 0.05 in bfloat16",
    )


class Recipe(BaseSettings):
    """Everything that defines a run."""

    model_config = SettingsConfigDict(
        env_prefix="MARS_", env_nested_delimiter="__", extra="forbid", frozen=True, allow_inf_nan=False
    )

    run: RunSection
    model: ModelSection
    data: DataSection
    rollout: RolloutSection
    reward: RewardSection = RewardSection()
    train: TrainSection
    weights: WeightsSection = WeightsSection()
    eval: EvalSection = EvalSection()
    sft: SftSection = SftSection()
    track: TrackSection = TrackSection()
    self_test: SelfTestSection = SelfTestSection()

    @model_validator(mode="after")
    def _completions_fit(self) -> Self:
        if self.rollout.max_completion_length >= self.model.max_model_len:
            raise ValueError(
                f"rollout.max_completion_length is {self.rollout.max_completion_length}; "
                f"expected less than model.max_model_len = {self.model.max_model_len}"
            )
        return self

    @model_validator(mode="after")
    def _algorithm_is_consistent(self) -> Self:
        train, longest = self.train, self.rollout.max_completion_length
        if train.importance_correction != "none" and self.rollout.top_p < 1:
            raise ValueError(
                f"train.importance_correction is {train.importance_correction!r} with rollout.top_p = {self.rollout.top_p}; "
                "expected top_p = 1: a sampler's probabilities within a nucleus are not comparable with the trainer's"
            )
        if train.max_staleness > 0 and train.importance_correction == "none":
            raise ValueError(
                f"train.max_staleness is {train.max_staleness} with train.importance_correction = 'none'; expected one of the "
                "corrections, e.g. 'token_truncate': older policies sample other tokens than the one that is trained"
            )
        if train.dual_clip is not None and train.dual_clip <= 1 + train.epsilon_high:
            raise ValueError(
                f"train.dual_clip is {train.dual_clip}; expected more than 1 + train.epsilon_high = {1 + train.epsilon_high}"
            )
        if train.overlong_buffer is not None and train.overlong_buffer > longest:
            raise ValueError(
                f"train.overlong_buffer is {train.overlong_buffer}; expected at most rollout.max_completion_length = {longest}"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings


class Deployment(BaseSettings):
    """Where things run; read from environment variables MARS_*."""

    model_config = SettingsConfigDict(env_prefix="MARS_", frozen=True, env_ignore_empty=True)

    redis_url: str = Field(default="redis://127.0.0.1:6379/0", description="Redis 6.2 or newer, or Valkey")
    api_key: SecretStr | None = Field(default=None, description="guards every route but /healthz and /readyz; printable ASCII")
    host: str = Field(default="127.0.0.1", description="address to bind; other than loopback needs an API key")
    reward_url: str = Field(default="http://127.0.0.1:8200", description="where rollout replicas find the reward service")
    max_body_mib: int = Field(default=64, ge=1, description="largest request body")
    upload_ttl_s: float = Field(default=3600, gt=0, description="seconds until uploads of ad-hoc requests expire")

    @field_validator("api_key")
    @classmethod
    def _empty_is_none(cls, key: SecretStr | None) -> SecretStr | None:
        return key if key is not None and key.get_secret_value() else None

    @field_validator("api_key")
    @classmethod
    def _fits_a_header(cls, key: SecretStr | None) -> SecretStr | None:
        # Headers and cookies carry ASCII; clients encode the rest in ways of their own, or refuse it. Refusing such a key at the
        # start needs no encoding in any of them. A ValueError would show the key beside what is wrong with it.
        text = "" if key is None else key.get_secret_value()
        if not (text.isascii() and text.isprintable() and text == text.strip()):
            raise ConfigError(
                "MARS_API_KEY has characters that an HTTP header does not carry; expected printable ASCII without a space at "
                "either end, such as `openssl rand -hex 32` prints"
            )
        return key

    lease_s: float = Field(default=15, gt=0, description="seconds without heartbeat until claimed work is handed on")


def load_recipe(path: Path) -> Recipe:
    """Read a TOML recipe, strictly, then apply MARS_* overrides from the environment.

    Raises:
        ConfigError: no such file, not TOML, an unknown key, a wrong type or value.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"recipe {path}: cannot be read ({error.strerror}); expected a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path}: not valid TOML: {error}") from error
    try:
        _StrictRecipe.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(f"recipe {path}: {_explain(error)}") from error
    overrides = _overrides()
    try:
        return Recipe(**data)
    except ValidationError as error:
        origin = f" with {', '.join(overrides)} from the environment" if overrides else ""
        raise ConfigError(f"recipe {path}{origin}: {_explain(error)}") from error
    except SettingsError as error:
        raise ConfigError(f"one of {', '.join(overrides)} in the environment cannot be read: {error}") from error


def _overrides() -> list[str]:
    """Environment variables that override a recipe's keys.

    Raises:
        ConfigError: one names no key: its section or key is misspelt.
    """
    names = sorted(name for name in os.environ if name.startswith("MARS_") and "__" in name)
    names += [name for section in Recipe.model_fields if (name := f"MARS_{section.upper()}") in os.environ]
    for name in sorted(os.environ):
        for section, field in Recipe.model_fields.items():
            key = name.removeprefix(f"MARS_{section.upper()}_")
            if key != name and key.lower() in _fields_of(field.annotation):
                raise ConfigError(f"{name} in the environment is no setting; did you mean MARS_{section.upper()}__{key}?")
    for name in names:
        section, _, key = name.removeprefix("MARS_").lower().partition("__")
        fields = Recipe.model_fields.get(section)
        if fields is None or not key or key.split("__")[0] not in _fields_of(fields.annotation):
            raise ConfigError(
                f"{name} in the environment names no recipe key; expected MARS_<SECTION>__<KEY>, e.g. MARS_TRAIN__STEPS"
            )
    return names


def _fields_of(section: Any) -> Collection[str]:
    return section.model_fields.keys() if isinstance(section, type) and issubclass(section, BaseModel) else ()


class _StrictRecipe(BaseModel):
    """The recipe's fields alone, without the environment: types in the file must be exact."""

    model_config = ConfigDict(extra="forbid")

    run: RunSection
    model: ModelSection
    data: DataSection
    rollout: RolloutSection
    reward: RewardSection = RewardSection()
    train: TrainSection
    weights: WeightsSection = WeightsSection()
    eval: EvalSection = EvalSection()
    sft: SftSection = SftSection()
    track: TrackSection = TrackSection()
    self_test: SelfTestSection = SelfTestSection()


def load_deployment() -> Deployment:
    """Read MARS_* from the environment.

    Raises:
        ConfigError: a variable has a wrong value, or a name that is nearly a known one.
    """
    _refuse_misspelt()
    try:
        return Deployment()
    except ValidationError as error:
        raise ConfigError(f"environment MARS_*: {_explain(error)}") from error


def _refuse_misspelt() -> None:
    """Other programs may have MARS_* variables of their own; one that is a slip of the pen would pass unseen."""
    known = {f"MARS_{name.upper()}" for name in Deployment.model_fields}
    for name in sorted(os.environ.keys() - known):
        if name.startswith("MARS_") and "__" not in name and (meant := get_close_matches(name, known, n=1, cutoff=0.85)):
            raise ConfigError(f"{name} in the environment is no setting; did you mean {meant[0]}?")


def _explain(error: ValidationError) -> str:
    return "; ".join(_fault(item) for item in error.errors(include_url=False))


def _fault(item: Mapping[str, Any]) -> str:
    key = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        return f"unknown key {key}"
    if item["type"] == "missing":
        return f"missing key {key}"
    came = item["input"]
    if item["type"] == "value_error" and isinstance(came, Mapping | BaseModel):
        # A rule about several keys names them itself; the whole section beside it would hide what it says.
        return str(item["msg"]).removeprefix("Value error, ")
    return f"{key} = {came!r}: {item['msg'].removeprefix('Value error, ')}"
