from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Empty(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Held(_message.Message):
    __slots__ = ("key", "digest")
    KEY_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    key: str
    digest: str
    def __init__(self, key: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("protocol", "site", "purpose", "digest", "configuration", "trainer", "fresh", "newest_protocol", "fold", "held")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    CONFIGURATION_FIELD_NUMBER: _ClassVar[int]
    TRAINER_FIELD_NUMBER: _ClassVar[int]
    FRESH_FIELD_NUMBER: _ClassVar[int]
    NEWEST_PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    FOLD_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    site: str
    purpose: str
    digest: str
    configuration: str
    trainer: str
    fresh: bool
    newest_protocol: int
    fold: str
    held: Held
    def __init__(self, protocol: _Optional[int] = ..., site: _Optional[str] = ..., purpose: _Optional[str] = ..., digest: _Optional[str] = ..., configuration: _Optional[str] = ..., trainer: _Optional[str] = ..., fresh: bool = ..., newest_protocol: _Optional[int] = ..., fold: _Optional[str] = ..., held: _Optional[_Union[Held, _Mapping]] = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("run", "attempt", "study", "protocol", "generation", "standing")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STUDY_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STANDING_FIELD_NUMBER: _ClassVar[int]
    run: str
    attempt: int
    study: str
    protocol: int
    generation: int
    standing: str
    def __init__(self, run: _Optional[str] = ..., attempt: _Optional[int] = ..., study: _Optional[str] = ..., protocol: _Optional[int] = ..., generation: _Optional[int] = ..., standing: _Optional[str] = ...) -> None: ...

class OfferRequest(_message.Message):
    __slots__ = ("run", "key", "site", "verb", "weight", "digest", "size", "position", "held", "correct")
    RUN_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    VERB_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    CORRECT_FIELD_NUMBER: _ClassVar[int]
    run: str
    key: str
    site: str
    verb: str
    weight: float
    digest: str
    size: int
    position: int
    held: Held
    correct: bool
    def __init__(self, run: _Optional[str] = ..., key: _Optional[str] = ..., site: _Optional[str] = ..., verb: _Optional[str] = ..., weight: _Optional[float] = ..., digest: _Optional[str] = ..., size: _Optional[int] = ..., position: _Optional[int] = ..., held: _Optional[_Union[Held, _Mapping]] = ..., correct: bool = ...) -> None: ...

class OfferReply(_message.Message):
    __slots__ = ("verdict", "position")
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    verdict: str
    position: int
    def __init__(self, verdict: _Optional[str] = ..., position: _Optional[int] = ...) -> None: ...

class UploadChunk(_message.Message):
    __slots__ = ("offer", "data")
    OFFER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offer: OfferRequest
    data: bytes
    def __init__(self, offer: _Optional[_Union[OfferRequest, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class ResultRequest(_message.Message):
    __slots__ = ("run", "key", "site", "wait_seconds", "digest", "position")
    RUN_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    run: str
    key: str
    site: str
    wait_seconds: float
    digest: str
    position: int
    def __init__(self, run: _Optional[str] = ..., key: _Optional[str] = ..., site: _Optional[str] = ..., wait_seconds: _Optional[float] = ..., digest: _Optional[str] = ..., position: _Optional[int] = ...) -> None: ...

class ResultHeader(_message.Message):
    __slots__ = ("status", "digest", "size", "error", "missing", "closes_at", "weights", "position", "wanted")
    class WeightsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    STATUS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    CLOSES_AT_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    status: str
    digest: str
    size: int
    error: str
    missing: _containers.RepeatedScalarFieldContainer[str]
    closes_at: float
    weights: _containers.ScalarMap[str, float]
    position: int
    wanted: bool
    def __init__(self, status: _Optional[str] = ..., digest: _Optional[str] = ..., size: _Optional[int] = ..., error: _Optional[str] = ..., missing: _Optional[_Iterable[str]] = ..., closes_at: _Optional[float] = ..., weights: _Optional[_Mapping[str, float]] = ..., position: _Optional[int] = ..., wanted: bool = ...) -> None: ...

class ResultChunk(_message.Message):
    __slots__ = ("header", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: ResultHeader
    data: bytes
    def __init__(self, header: _Optional[_Union[ResultHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class NewestRequest(_message.Message):
    __slots__ = ("run", "name")
    RUN_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    run: str
    name: str
    def __init__(self, run: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class NewestReply(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: str
    def __init__(self, key: _Optional[str] = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("run", "site", "progress", "note")
    RUN_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    run: str
    site: str
    progress: str
    note: str
    def __init__(self, run: _Optional[str] = ..., site: _Optional[str] = ..., progress: _Optional[str] = ..., note: _Optional[str] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("run", "site", "reason", "returns")
    RUN_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RETURNS_FIELD_NUMBER: _ClassVar[int]
    run: str
    site: str
    reason: str
    returns: bool
    def __init__(self, run: _Optional[str] = ..., site: _Optional[str] = ..., reason: _Optional[str] = ..., returns: bool = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("record", "newest_protocol", "page")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    NEWEST_PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    PAGE_FIELD_NUMBER: _ClassVar[int]
    record: bool
    newest_protocol: int
    page: str
    def __init__(self, record: bool = ..., newest_protocol: _Optional[int] = ..., page: _Optional[str] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("status", "next")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    status: str
    next: str
    def __init__(self, status: _Optional[str] = ..., next: _Optional[str] = ...) -> None: ...

class PeerInfo(_message.Message):
    __slots__ = ("protocol", "site", "run", "training_cases", "leaving")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    TRAINING_CASES_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    site: str
    run: str
    training_cases: int
    leaving: bool
    def __init__(self, protocol: _Optional[int] = ..., site: _Optional[str] = ..., run: _Optional[str] = ..., training_cases: _Optional[int] = ..., leaving: bool = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("protocol", "site", "run", "vector", "epoch", "training_cases", "initial", "schema", "digest", "size", "position")
    class VectorEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TRAINING_CASES_FIELD_NUMBER: _ClassVar[int]
    INITIAL_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    site: str
    run: str
    vector: _containers.ScalarMap[str, int]
    epoch: int
    training_cases: int
    initial: str
    schema: str
    digest: str
    size: int
    position: int
    def __init__(self, protocol: _Optional[int] = ..., site: _Optional[str] = ..., run: _Optional[str] = ..., vector: _Optional[_Mapping[str, int]] = ..., epoch: _Optional[int] = ..., training_cases: _Optional[int] = ..., initial: _Optional[str] = ..., schema: _Optional[str] = ..., digest: _Optional[str] = ..., size: _Optional[int] = ..., position: _Optional[int] = ...) -> None: ...

class PeerReply(_message.Message):
    __slots__ = ("verdict", "reason", "position")
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    verdict: str
    reason: str
    position: int
    def __init__(self, verdict: _Optional[str] = ..., reason: _Optional[str] = ..., position: _Optional[int] = ...) -> None: ...

class ModelChunk(_message.Message):
    __slots__ = ("model", "data", "reply")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    model: Model
    data: bytes
    reply: PeerReply
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ..., data: _Optional[bytes] = ..., reply: _Optional[_Union[PeerReply, _Mapping]] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("protocol", "site", "run", "schema", "counter", "digest", "position")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    COUNTER_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    site: str
    run: str
    schema: str
    counter: int
    digest: str
    position: int
    def __init__(self, protocol: _Optional[int] = ..., site: _Optional[str] = ..., run: _Optional[str] = ..., schema: _Optional[str] = ..., counter: _Optional[int] = ..., digest: _Optional[str] = ..., position: _Optional[int] = ...) -> None: ...
