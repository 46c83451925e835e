"""Coverage-guided fuzzing of the short way to read a message that holds data: it must read what protobuf reads.

python -m pip install atheris
python tests/fuzz/frames.py -max_total_time=600
"""

from __future__ import annotations

import sys

import atheris
from google.protobuf.message import DecodeError

with atheris.instrument_imports(include=["nnunet_fed"]):
    from nnunet_fed.transport.channel.zero_copy_streams import reader, write
    from nnunet_fed.transport.proto import federation_pb2 as pb

KINDS = (pb.UploadChunk, pb.ResultChunk, pb.ModelChunk)
READERS = [(kind, reader(kind)) for kind in KINDS]


def one_input(data: bytes) -> None:
    """Read the bytes as each kind of message, in both ways; and send them as data."""
    for kind, read in READERS:
        try:
            expected = kind.FromString(data)
        except DecodeError:
            expected = None
        try:
            message = read(data)
        except DecodeError:
            message = None
        if isinstance(message, memoryview):
            assert expected is not None
            assert expected.WhichOneof("part") == "data"
            assert expected.data == message
        else:
            assert message == expected
        sent = read(write(memoryview(data)))
        assert isinstance(sent, memoryview)
        assert sent == data


def main() -> None:
    """Fuzz until libFuzzer's options say enough, or something is found."""
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
