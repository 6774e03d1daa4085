"""The messages that flow between services: frozen pydantic models, nothing else.

One flow, four nouns: a `Prompt` is asked, a `RolloutGroup` answers it, a
`ScoredGroup` judges the answers, a `WeightManifest` names the policy that gave them.
"""

from mars_shared.contracts.base import SCHEMA_VERSION, Contract, Message, PolicyVersion
from mars_shared.contracts.prompt import (
    BoxesTruth,
    Decoding,
    FrameKind,
    Prompt,
    Purpose,
    SamplingSpec,
    Source,
    TextTruth,
    Truth,
    View,
)
from mars_shared.contracts.reward import ReleasedEval, Score, ScoredGroup, ScoreItem, ScoreRequest, ScoreResponse, Unscored
from mars_shared.contracts.rollout import (
    BoxFrame,
    Completion,
    FinishReason,
    Kind,
    RenderedView,
    RolloutGroup,
    VersionSpan,
    expected_members,
    sampling_seed,
)
from mars_shared.contracts.weights import WeightFile, WeightIdentity, WeightManifest, WeightsKind

__all__ = [
    "SCHEMA_VERSION",
    "BoxFrame",
    "BoxesTruth",
    "Completion",
    "Contract",
    "Decoding",
    "FinishReason",
    "FrameKind",
    "Kind",
    "Message",
    "PolicyVersion",
    "Prompt",
    "Purpose",
    "ReleasedEval",
    "RenderedView",
    "RolloutGroup",
    "SamplingSpec",
    "Score",
    "ScoreItem",
    "ScoreRequest",
    "ScoreResponse",
    "ScoredGroup",
    "Source",
    "TextTruth",
    "Truth",
    "Unscored",
    "VersionSpan",
    "View",
    "WeightFile",
    "WeightIdentity",
    "WeightManifest",
    "WeightsKind",
    "expected_members",
    "sampling_seed",
]
