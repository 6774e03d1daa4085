"""One exception hierarchy. Every message says what was expected, what came, which item, what to do.

MarsError
├── ConfigError          a recipe, an environment variable or a command line is wrong      exit 2
│   └── SelfTestError    sampler and trainer disagree at the start of a run
├── InputError           an item (prompt, image, completion, row) is wrong                 HTTP 422
│   ├── ImageError       an image cannot be used: unreadable, too large, too small
│   ├── TooLongError     a prompt does not fit the model's context
│   ├── MediaTypeError   an upload's type is not an image type we read                         HTTP 415
│   ├── TooLargeError    a request body or an image is over its limit                          HTTP 413
│   └── BlobMissingError no bytes under that hash                                              HTTP 404
├── DivergedError        training left the finite numbers                                  exit 3
├── NotReadyError        the service cannot serve yet, or no more                          HTTP 503
├── RewardError          a completion got no reward: the function raised                        exit 3
│   ├── RewardTimeoutError   it took too long, by the clock or (RewardCpuTimeoutError) in CPU seconds
│   ├── RewardDiedError      it ended its process
│   └── RewardNotFiniteError it gave NaN or infinity
├── IntegrityError       bytes do not match their hash: published weights, a blob, a checkpoint
│   ├── DeltaError           a weight delta is malformed, or does not fit the tensor it is for
│   ├── NoRouteError         no publications in the weights store lead to the wanted weights
│   └── WeightsMissingError  a publication, or a file of it, is not in the weights store      HTTP 404
├── WeightsUnavailableError  the place that the weights come from does not answer           HTTP 503
├── CheckpointError      weights or a checkpoint cannot be used: of another model              exit 2
└── QueueError           Redis cannot be used
    ├── QueueUnavailableError   it does not answer                                         HTTP 503
    ├── LeaseLostError          the claimed item now belongs to another consumer
    └── FencedError             a newer incarnation of the trainer has taken over          exit 2
"""

from __future__ import annotations


class MarsError(Exception):
    """Base of all errors that mars raises on purpose."""

    http_status = 500
    exit_code = 1


class ConfigError(MarsError):
    """A recipe, an environment variable or a command line is wrong."""

    http_status = 400
    exit_code = 2


class SelfTestError(ConfigError):
    """Sampler and trainer disagree, or the group that would show it cannot be made; starting again will not help."""


class InputError(MarsError):
    """An item is wrong; other items are not affected."""

    http_status = 422
    exit_code = 3


class ImageError(InputError):
    """An image cannot be used."""


class TooLongError(InputError):
    """A prompt with its completion does not fit the model's context."""


class MediaTypeError(InputError):
    """An upload's media type is not one of the image types we read."""

    http_status = 415


class TooLargeError(InputError):
    """A request body or an image is over its limit."""

    http_status = 413


class BlobMissingError(InputError):
    """No bytes are stored under that hash."""

    http_status = 404


class RecordMissingError(InputError):
    """A run has no group of that name, or a group no source of that name."""

    http_status = 404


class DivergedError(MarsError):
    """Training left the finite numbers; the same would happen again."""

    exit_code = 3


class NotReadyError(MarsError):
    """The service cannot serve yet, or no more."""

    http_status = 503


class RewardError(MarsError):
    """A completion got no reward; what the reward depends on may come back.

    `traceback` is that of the reward's own process, if it said one; `reason` is what dead letters and metrics call it.
    """

    exit_code = 3
    reason = "reward failed"

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.traceback = traceback

    @property
    def detail(self) -> str:
        """Message and traceback."""
        return f"{self}\n{self.traceback}".rstrip()


class RewardTimeoutError(RewardError):
    """The reward took too long by the clock: it waits for something, or the machine is busy."""

    reason = "reward timed out"


class RewardCpuTimeoutError(RewardTimeoutError):
    """The reward used more CPU seconds than it may, which depends on the completion and hardly on the machine."""


class RewardDiedError(RewardError):
    """The reward's process ended in the middle of a completion."""

    reason = "reward process died"


class RewardNotFiniteError(RewardError):
    """The reward is NaN or infinite."""

    reason = "reward is not finite"


class IntegrityError(MarsError):
    """Bytes do not match the hash that names them."""


class WeightsMissingError(IntegrityError):
    """A publication, or a file of it, is not in the weights store: removed since it was listed, or damaged."""

    http_status = 404


class WeightsUnavailableError(MarsError):
    """The place that the weights come from does not answer; it may do so later."""

    http_status = 503


class NoRouteError(IntegrityError):
    """No publications in the weights store lead to the wanted weights; the trainer writes a snapshot."""


class DeltaError(IntegrityError):
    """A weight delta is malformed, or does not fit the tensor it is for; nothing has been written."""


class CheckpointError(MarsError):
    """A checkpoint cannot be used; trying again will not help."""

    exit_code = 2


class QueueError(MarsError):
    """Redis cannot be used."""


class QueueUnavailableError(QueueError):
    """Redis does not answer."""

    http_status = 503


class LeaseLostError(QueueError):
    """The claimed item belongs to another consumer by now."""


class FencedError(QueueError):
    """A newer incarnation of the trainer has taken over; what an older one says is refused."""

    exit_code = 2
