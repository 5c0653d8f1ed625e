"""Everything Scanwire refuses or fails with, as one tree.

    ScanwireError
    ├── InvalidRequest              400  the request itself cannot be read
    │   └── InvalidCursor           400  a cursor that no Scanwire ever gave out
    ├── KeyRequired                 401  an API key is needed
    ├── TokenRequired               401  the token of a scan's producer is needed
    ├── Forbidden                   403  known, but not allowed
    ├── NotFound                    404  no such address
    │   ├── UnknownScan             404  no scan has this id (any more)
    │   └── UnknownSymbol           404  the price file has no such symbol
    ├── WrongMethod                 405  the address exists, the method does not
    ├── NotAcceptable               406  none of the formats asked for can be given
    ├── SlowRequest                 408  a head or a body that trickles
    ├── Conflict                    409  the same Idempotency-Key with another body; events that cannot come now
    ├── Trimmed                     410  the scan is known, its rows are past retention
    ├── TooLarge                    413  a body over the bound
    ├── UnsupportedMedia            415  a body of another type
    ├── InvalidParams               422  readable, but wrong: names each field
    ├── RateLimited                 429  a bucket is empty
    ├── HeadTooLarge                431  a request head over the bound
    ├── AtCapacity                  503  every place is taken, for now
    ├── Draining                    503  the server is about to stop
    ├── JournalUnavailable          503  the journal cannot be written, for now
    ├── ScanFailed                       why a scan ended as failed or lost (`end.error`)
    │   ├── WorkerCrashed
    │   ├── DeadlineExceeded
    │   ├── ScannerError
    │   ├── PricesChanged
    │   ├── ProducerFailed
    │   ├── ProducerLost
    │   └── EventsLost
    ├── PricesError                      a price file that cannot be used
    └── WrongState                       a bug: a state change that the design forbids

Each one knows its problem type (RFC 9457), its HTTP status, the WebSocket close code that goes with it and, where
waiting helps, for how long.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from pydantic import ValidationError

QUOTA_EXCEEDED = "https://iana.org/assignments/http-problem-types#quota-exceeded"
REDUCED_CAPACITY = "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity"


class ScanwireError(Exception):
    """What happened and what to do next, in one sentence that may be shown to any client."""

    type: ClassVar[str] = "urn:scanwire:problem:error"
    title: ClassVar[str] = "Something went wrong"
    status: ClassVar[int] = 500
    close_code: ClassVar[int] = 1008

    def __init__(
        self,
        detail: str,
        *,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
        **extra: Any,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after_s = retry_after_s
        # Header fields that belong to the refusal, beside Retry-After.
        self.headers = dict(headers or {})
        # Further members of the problem object, such as `limit` or `errors`.
        self.extra = extra

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process sends its errors pickled; the constructors of subclasses take other arguments than `args`.
        return _restore, (type(self), self.args, self.__dict__)

    def to_problem(self) -> dict[str, Any]:
        """The problem object of RFC 9457, with `retry_after_s` where waiting helps."""
        problem: dict[str, Any] = {
            "type": self.type,
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
        }
        if self.retry_after_s is not None:
            problem["retry_after_s"] = round(self.retry_after_s, 3)
        return problem | self.extra


def _restore(kind: "type[ScanwireError]", args: tuple[Any, ...], state: dict[str, Any]) -> ScanwireError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class InvalidRequest(ScanwireError):
    type = "urn:scanwire:problem:invalid-request"
    title = "The request cannot be read"
    status = 400


class InvalidCursor(InvalidRequest):
    type = "urn:scanwire:problem:invalid-cursor"
    title = "This is not a cursor"


class KeyRequired(ScanwireError):
    type = "urn:scanwire:problem:key-required"
    title = "An API key is needed"
    status = 401

    def __init__(self, detail: str) -> None:
        super().__init__(detail, headers={"WWW-Authenticate": 'Bearer realm="scanwire"'})


class TokenRequired(ScanwireError):
    type = "urn:scanwire:problem:token-required"
    title = "The producer's token is needed"
    status = 401

    def __init__(self, detail: str) -> None:
        super().__init__(detail, headers={"WWW-Authenticate": 'Bearer realm="scanwire producer"'})


class Forbidden(ScanwireError):
    type = "urn:scanwire:problem:forbidden"
    title = "Not allowed"
    status = 403


class NotFound(ScanwireError):
    type = "urn:scanwire:problem:not-found"
    title = "There is nothing here"
    status = 404


class UnknownScan(NotFound):
    type = "urn:scanwire:problem:unknown-scan"
    title = "No such scan"

    def __init__(self, scan_id: str) -> None:
        super().__init__(
            f"No scan {scan_id[:64]!r} is kept here. It may be past its retention; submit it again.",
        )


class UnknownSymbol(NotFound):
    type = "urn:scanwire:problem:unknown-symbol"
    title = "No such symbol"


class WrongMethod(ScanwireError):
    type = "urn:scanwire:problem:wrong-method"
    title = "The address does not take this method"
    status = 405


class NotAcceptable(ScanwireError):
    type = "urn:scanwire:problem:not-acceptable"
    title = "No format that was asked for can be given"
    status = 406


class SlowRequest(ScanwireError):
    type = "urn:scanwire:problem:slow-request"
    title = "The request did not come in time"
    status = 408


class Conflict(ScanwireError):
    type = "urn:scanwire:problem:conflict"
    title = "This contradicts what is already there"
    status = 409


class Trimmed(ScanwireError):
    type = "urn:scanwire:problem:trimmed"
    title = "The rows are past their retention"
    status = 410


class TooLarge(ScanwireError):
    type = "urn:scanwire:problem:too-large"
    title = "The body is too large"
    status = 413
    close_code = 1009


class UnsupportedMedia(ScanwireError):
    type = "urn:scanwire:problem:unsupported-media"
    title = "The body is of a type that is not taken"
    status = 415


class InvalidParams(ScanwireError):
    """Readable, but wrong. `errors` names each field and says what would be right."""

    type = "urn:scanwire:problem:invalid-params"
    title = "Some values are not valid"
    status = 422

    def __init__(self, errors: Sequence[Mapping[str, str]]) -> None:
        detail = "; ".join(f"{e['field']}: {e['message']}" for e in errors)
        super().__init__(detail, errors=[dict(e) for e in errors])
        self.errors = errors

    @classmethod
    def of(cls, field: str, message: str) -> "InvalidParams":
        return cls([{"field": field, "message": message}])

    @classmethod
    def explain(cls, error: "ValidationError", words: Mapping[str, str] | None = None) -> "InvalidParams":
        """Pydantic's findings, naming each field. `words` are used in place of its own, by the type of a finding."""
        words = words or {}
        return cls(
            [
                {"field": ".".join(map(str, one["loc"]))[:64] or "body", "message": words.get(one["type"], one["msg"])}
                for one in error.errors(include_url=False, include_context=False, include_input=False)
            ]
        )


class RateLimited(ScanwireError):
    type = QUOTA_EXCEEDED
    title = "Too many requests"
    status = 429
    close_code = 4429


class HeadTooLarge(ScanwireError):
    type = "urn:scanwire:problem:head-too-large"
    title = "The head of the request is too large"
    status = 431


class AtCapacity(ScanwireError):
    type = REDUCED_CAPACITY
    title = "Every place is taken"
    status = 503
    close_code = 1013


class Draining(ScanwireError):
    type = REDUCED_CAPACITY
    title = "The server is stopping"
    status = 503
    close_code = 1001


class JournalUnavailable(ScanwireError):
    type = REDUCED_CAPACITY
    title = "The journal cannot be written"
    status = 503
    close_code = 1013


class ScanFailed(ScanwireError):
    type = "urn:scanwire:problem:scan-failed"
    title = "The scan failed"


class WorkerCrashed(ScanFailed):
    type = "urn:scanwire:problem:worker-crashed"
    title = "The worker process died"


class DeadlineExceeded(ScanFailed):
    type = "urn:scanwire:problem:deadline-exceeded"
    title = "The scan took longer than it may"


class ScannerError(ScanFailed):
    type = "urn:scanwire:problem:scanner-error"
    title = "The scanner raised an error"


class PricesChanged(ScanFailed):
    type = "urn:scanwire:problem:prices-changed"
    title = "The price data changed under the scan"


class ProducerFailed(ScanFailed):
    type = "urn:scanwire:problem:producer-failed"
    title = "The producer says that its work failed"


class ProducerLost(ScanFailed):
    type = "urn:scanwire:problem:producer-lost"
    title = "The producer was silent for too long"


class EventsLost(ScanFailed):
    type = "urn:scanwire:problem:events-lost"
    title = "Events of the scan were lost with a damaged journal"


class PricesError(ScanwireError):
    type = "urn:scanwire:problem:prices"
    title = "The price file cannot be used"


class WrongState(ScanwireError):
    type = "urn:scanwire:problem:wrong-state"
    title = "A state change that is not allowed"
