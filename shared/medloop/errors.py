"""The error tree.

    MedLoopError                  500  internal
    ├── InvalidRequest            400  invalid-request
    │   ├── InvalidImage          422  invalid-image        not an image, truncated, unreadable
    │   │   ├── UnsupportedImage  415  unsupported-image    a format or mode we do not decode
    │   │   └── ImageTooLarge     413  image-too-large      header promises more pixels than allowed
    │   ├── BodyTooLarge          413  body-too-large
    │   ├── BodyTooSlow           408  body-too-slow        it had not arrived when its time was up
    │   └── InvalidDataset        422  invalid-dataset      carries the table of what is wrong, by name
    ├── Unauthenticated           401  unauthenticated
    ├── Forbidden                 403  forbidden
    ├── NotFound                  404  not-found
    ├── Conflict                  409  conflict             somebody else changed it first
    ├── UntrustedModel            409  untrusted-model      hash, signature or golden check failed
    ├── TrainingFailed            500  training-failed
    ├── Preempted                 503  preempted            told to stop; what was done so far is kept
    ├── RateLimited               429  rate-limited         this caller asks too often
    │   └── Overloaded            429  overloaded           everybody together does
    ├── Unavailable               503  unavailable
    │   ├── TrackingUnavailable   503  tracking-unavailable
    │   ├── StorageUnavailable    503  storage-unavailable
    │   ├── NoModel               503  no-model             nothing approved to answer with
    │   └── DeadlineExceeded      504  deadline-exceeded    the caller's time ran out first
    ├── StorageFull               507  storage-full
    └── PortInUse                 500  port-in-use

Each class carries its HTTP status, a machine-readable code and the exit status of the command line; one handler
(`medloop.http`) and one edge of the command line (`medloop.cli`) turn them into answers. The message is one clear
sentence for people and says what to do.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar


class MedLoopError(Exception):
    """Base of all errors that MedLoop raises on purpose.

    `detail` is the sentence people read; `extra` goes into the problem document as extension members (RFC 9457 §3.2)
    and must be JSON-serialisable.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    exit_status: ClassVar[int] = 1

    def __init__(self, detail: str, **extra: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.extra = extra


class InvalidRequest(MedLoopError):
    status, code, exit_status = 400, "invalid-request", 3


class InvalidImage(InvalidRequest):
    status, code = 422, "invalid-image"


class UnsupportedImage(InvalidImage):
    status, code = 415, "unsupported-image"


class ImageTooLarge(InvalidImage):
    status, code = 413, "image-too-large"


class BodyTooLarge(InvalidRequest):
    status, code = 413, "body-too-large"


class BodyTooSlow(InvalidRequest):
    status, code = 408, "body-too-slow"


@dataclass(frozen=True, slots=True)
class Issue:
    """One thing that is wrong with a data set: what kind, where (a name inside the source), and what to do."""

    kind: str
    where: str
    detail: str


class InvalidDataset(InvalidRequest):
    """A data set that cannot be used as it is; `issues` lists everything that was found, by name."""

    status, code = 422, "invalid-dataset"

    def __init__(self, detail: str, issues: Sequence[Issue] = ()) -> None:
        super().__init__(detail, issues=[asdict(issue) for issue in issues])
        self.issues = tuple(issues)


class Unauthenticated(MedLoopError):
    status, code, exit_status = 401, "unauthenticated", 5


class Forbidden(MedLoopError):
    status, code, exit_status = 403, "forbidden", 5


class NotFound(MedLoopError):
    status, code, exit_status = 404, "not-found", 6


class ObjectTooLarge(MedLoopError):
    """A stored object is larger than whoever asks for it can take."""

    code = "object-too-large"


class Conflict(MedLoopError):
    status, code, exit_status = 409, "conflict", 7


class UntrustedModel(MedLoopError):
    status, code, exit_status = 409, "untrusted-model", 8


class TrainingFailed(MedLoopError):
    code, exit_status = "training-failed", 9


class Preempted(MedLoopError):
    """Told to stop before the work was done; what was done is kept, and doing the same again goes on from there."""

    # EX_TEMPFAIL of sysexits.h: a scheduler that starts the job again does right.
    status, code, exit_status = 503, "preempted", 75


class Unavailable(MedLoopError):
    status, code, exit_status = 503, "unavailable", 4


class TrackingUnavailable(Unavailable):
    code = "tracking-unavailable"


class StorageUnavailable(Unavailable):
    code = "storage-unavailable"


class NoModel(Unavailable):
    code = "no-model"


class DeadlineExceeded(Unavailable):
    status, code = 504, "deadline-exceeded"


class RateLimited(MedLoopError):
    """Refused at the door; `retry_after` (whole seconds, ≥ 1) becomes the header of that name (RFC 9110 §10.2.3)."""

    status, code, exit_status = 429, "rate-limited", 12

    def __init__(self, detail: str, *, retry_after: int = 1) -> None:
        super().__init__(detail, retry_after=retry_after)
        self.retry_after = retry_after


class Overloaded(RateLimited):
    code = "overloaded"


class StorageFull(MedLoopError):
    status, code, exit_status = 507, "storage-full", 10


class PortInUse(MedLoopError):
    code, exit_status = "port-in-use", 11
