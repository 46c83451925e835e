from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class IntroduceRequest(_message.Message):
    __slots__ = ("site", "protocol", "versions", "newest_protocol")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SITE_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    NEWEST_PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    site: str
    protocol: int
    versions: _containers.ScalarMap[str, str]
    newest_protocol: int
    def __init__(self, site: _Optional[str] = ..., protocol: _Optional[int] = ..., versions: _Optional[_Mapping[str, str]] = ..., newest_protocol: _Optional[int] = ...) -> None: ...

class IntroduceReply(_message.Message):
    __slots__ = ("protocol", "version", "now", "planning_run", "versions")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NOW_FIELD_NUMBER: _ClassVar[int]
    PLANNING_RUN_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    version: str
    now: float
    planning_run: str
    versions: str
    def __init__(self, protocol: _Optional[int] = ..., version: _Optional[str] = ..., now: _Optional[float] = ..., planning_run: _Optional[str] = ..., versions: _Optional[str] = ...) -> None: ...

class Noise(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class NoiseRequest(_message.Message):
    __slots__ = ("site", "size")
    SITE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    site: str
    size: int
    def __init__(self, site: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class NoiseCount(_message.Message):
    __slots__ = ("size",)
    SIZE_FIELD_NUMBER: _ClassVar[int]
    size: int
    def __init__(self, size: _Optional[int] = ...) -> None: ...
