"""Coverage-guided fuzzing of what reads payloads: whatever the bytes are, they are refused or used, and nothing worse.

What is let in as a contribution must also be reduced: the mean of a payload with itself has its bits.

    python -m pip install atheris
    python tests/fuzz/payload.py -max_total_time=600 CORPUS_FOLDER
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import atheris
import numpy as np
from starting import fuzz

with atheris.instrument_imports(include=["nnunet_fed"]):
    from nnunet_fed.coordinator.admission import check_content
    from nnunet_fed.errors import RefusedError
    from nnunet_fed.exchange.payload import DTYPES, decode, encode, layout_of, open_payload, read_layout, schema_of
    from nnunet_fed.exchange.reduction import write_result

SEEDS = [
    {"w": np.arange(4, dtype=np.float32).reshape(2, 2), "b": np.zeros((), np.float16)},
    {"value": np.array([1, 2**62])},
    {"ü": np.zeros((0, 3)), "flag": np.array([True])},
]


WORDS = [*DTYPES, "dtype", "shape", "data_offsets", "value", "w", "__metadata__"]


def one_input(data: bytes, folder: Path) -> None:
    """Take the bytes as a payload, and the first line of them as the header of another one, with the right length."""
    read_in_every_way(data, folder)
    header, _, values = data.partition(b"\n")
    read_in_every_way(len(header).to_bytes(8, "little") + header + values, folder)


def read_in_every_way(data: bytes, folder: Path) -> None:
    """As the coordinator reads a contribution."""
    decode_and_encode(data)
    path = folder / "payload"
    path.write_bytes(data)
    for verb in ("mean", "sum", "gather"):
        try:
            check_content(verb, path)  # type: ignore[arg-type]
            write_result(verb, {"a": path, "b": path}, [1.0, 2.0], folder / "result")  # type: ignore[arg-type]
        except RefusedError:
            continue
        if verb == "mean":
            given, mean = open_payload(path), open_payload(folder / "result")
            assert schema_of(layout_of(given)) == schema_of(layout_of(mean))
            small = {name for name, array in given.items() if array.dtype.itemsize <= 4}
            assert all(given[name].tobytes() == mean[name].tobytes() for name in small)


def decode_and_encode(data: bytes) -> None:
    """What is a payload stays the same, written again."""
    try:
        tensors = decode(data)
    except RefusedError:
        return
    written = b"".join(encode(tensors))
    assert schema_of(read_layout(written)[0]) == schema_of(read_layout(data)[0])
    again = decode(written)
    assert all(again[name].tobytes() == array.tobytes() for name, array in tensors.items())


def main() -> None:
    """Fuzz until libFuzzer's options say enough, or something is found."""
    shared_memory = Path("/dev/shm")
    with TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None, prefix="nnunet_fed_fuzz_") as name:
        written = [b"".join(encode(tensors)) for tensors in SEEDS]
        begins = [read_layout(payload)[1] for payload in written]
        lines = [payload[8:begin] + b"\n" + payload[begin:] for payload, begin in zip(written, begins, strict=True)]
        words = Path(name) / "words"
        words.write_text("".join(f'"\\"{word}\\""\n' for word in WORDS))
        fuzz(lambda data: one_input(data, Path(name)), Path(name), [*written, *lines], [f"-dict={words}"])


if __name__ == "__main__":
    main()
