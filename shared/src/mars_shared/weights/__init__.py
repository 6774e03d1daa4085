"""How the policy's weights travel from the trainer to the replicas."""

from mars_shared.weights.publications import COMPLAINT, MANIFEST, describe_file, model_fingerprint
from mars_shared.weights.readers import READER_S
from mars_shared.weights.source import WeightSource, open_source
from mars_shared.weights.store import WeightsStore

__all__ = [
    "COMPLAINT",
    "MANIFEST",
    "READER_S",
    "WeightSource",
    "WeightsStore",
    "describe_file",
    "model_fingerprint",
    "open_source",
]
