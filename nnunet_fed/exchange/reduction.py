"""What the coordinator does with the contributions of one collective. Source: ours."""

from __future__ import annotations

import json
import math
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nnunet_fed.errors import RefusedError
from nnunet_fed.exchange import payload
from nnunet_fed.exchange.payload import (
    Array,
    Tensors,
    bytes_of,
    decode,
    encode,
    header_of,
    layout_of,
    measure,
    open_payload,
)
from nnunet_fed.files import PRIVATE_FILE, replacing

THREADS = min(4, os.cpu_count() or 1)
"""Of a mean."""


def write_result(verb: str, files: Mapping[str, Path], weights: Sequence[float], out: Path) -> tuple[str, int]:
    """Reduce checked payloads into a file, which appears once it is complete.

    Args:
        verb: ``mean``, ``sum`` or ``gather``.
        files: payloads by site, in the order of the names.
        weights: of the sites, in the same order; a mean's only.
        out: the result's file.

    Returns:
        Digest and size of the result.

    Raises:
        RefusedError: a sum does not fit into 64 bits, or a mean is not finite.
    """
    # the sites have its bytes while the disk takes them: who serves it makes it durable
    with replacing(out, mode=PRIVATE_FILE, durable=False) as part, part.open("wb") as file:
        if verb == "mean":
            return mean_payload([open_payload(path) for path in files.values()], weights, file)
        if verb == "sum":
            arrays = [decode(path.read_bytes())["value"] for path in files.values()]
            result = b"".join(encode({"value": exact_sum(arrays)}))
        else:
            values = (
                f"{json.dumps(site)}: {json.dumps(json.loads(path.read_bytes()))}" for site, path in files.items()
            )
            result = f"{{{', '.join(values)}}}".encode()  # one value is decoded at a time
        file.write(result)
        return measure([result])


def weighted_mean(arrays: Sequence[Array], weights: Sequence[float]) -> Array:
    """The weighted mean of arrays of one shape, in their dtype and shape.

    Products are summed in float64 in the order given, starting from the first and not from zero. So the mean of equal
    arrays of 32 bits or fewer is that array, bit for bit, signed zeros included, when weights are whole numbers below
    2**29 or sites few.
    """
    flat, scratch = [array.reshape(-1) for array in arrays], _Scratch()
    mean = np.empty(arrays[0].shape, arrays[0].dtype)
    for start, stop in _blocks(mean.size):
        scratch.mean([array[start:stop] for array in flat], weights, mean.reshape(-1)[start:stop])
    return mean


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + payload.BLOCK, size)) for start in range(0, size, payload.BLOCK))


class _Scratch(threading.local):
    """Each thread's memory for the sums of one block. New memory for each block would cost more than the arithmetic."""

    def __init__(self) -> None:
        self._summed, self._product = np.empty(payload.BLOCK), np.empty(payload.BLOCK)

    def mean(self, blocks: Sequence[Array], weights: Sequence[float], out: Array) -> None:
        """Put the mean of flat blocks into ``out``; see :func:`weighted_mean`."""
        if len(blocks) == 1:
            out[:] = blocks[0]
            return
        summed, product = self._summed[: out.size], self._product[: out.size]
        summed[:] = blocks[0]
        summed *= weights[0]
        for block, weight in zip(blocks[1:], weights[1:], strict=True):
            product[:] = block
            product *= weight
            summed += product
        summed /= math.fsum(weights)
        out[:] = summed
        # of 32 bits and fewer, finite numbers times bounded weights have a finite mean
        if out.dtype.itemsize > 4 and not np.isfinite(out).all():
            raise RefusedError("The mean of the sites' tensors is not finite: their numbers are too large.")


def mean_payload(payloads: Sequence[Tensors], weights: Sequence[float], out: BinaryIO) -> tuple[str, int]:
    """Write the payload of the weighted mean, block by block, into a new file; returns its digest and size in bytes.

    Threads reduce blocks and write them where they belong; the digest follows in the order of the file. Memory does not
    grow with the number of payloads when these are memory-mapped (:func:`nnunet_fed.exchange.payload.open_payload`).
    """
    layout = layout_of(payloads[0])
    header = header_of(layout)

    def tasks() -> Iterator[tuple[int, list[Array]]]:
        """Where each block's mean belongs, and the block at all sites."""
        for name, entry in layout.items():
            flat = [tensors[name].reshape(-1) for tensors in payloads]
            for start, stop in _blocks(math.prod(entry.shape)):
                position = len(header) + entry.start + start * entry.dtype.itemsize
                yield position, [array[start:stop] for array in flat]

    scratch = _Scratch()

    def reduce(position: int, blocks: list[Array], memory: Array) -> memoryview:
        mean = memory.view(blocks[0].dtype)[: blocks[0].size]
        scratch.mean(blocks, weights, mean)
        _write_at(out.fileno(), bytes_of(mean), position)
        return bytes_of(mean)

    def written() -> Iterator[bytes | memoryview]:
        _write_at(out.fileno(), memoryview(header), 0)
        yield header
        memories = [np.empty(payload.BLOCK, np.float64) for _ in range(2 * THREADS)]
        waiting: deque[Future[memoryview]] = deque()
        with ThreadPoolExecutor(THREADS) as executor:
            for number, (position, blocks) in enumerate(tasks()):
                if len(waiting) == len(memories):  # the oldest, whose memory the next block takes
                    yield waiting.popleft().result()
                waiting.append(executor.submit(reduce, position, blocks, memories[number % len(memories)]))
            for future in waiting:
                yield future.result()

    return measure(written())


def _write_at(descriptor: int, piece: memoryview, position: int) -> None:
    while piece:  # less may be written than is given
        written = os.pwrite(descriptor, piece, position)
        piece, position = piece[written:], position + written


def exact_sum(arrays: Sequence[Array]) -> Array:
    """Sum in the order given: whole numbers in int64, floating-point numbers in float64.

    Raises:
        RefusedError: a sum of whole numbers does not fit into int64, or shapes or dtypes differ.
    """
    if len({(array.dtype, array.shape) for array in arrays}) > 1:
        raise RefusedError("The sites' arrays differ in shape or dtype.")
    if not np.issubdtype(arrays[0].dtype, np.integer):
        summed = np.asarray(np.sum(np.stack([array.astype(np.float64) for array in arrays]), axis=0))
        if not np.isfinite(summed).all():
            raise RefusedError("The sum of the sites' arrays is not finite.")
        return summed
    flat, total = [array.reshape(-1) for array in arrays], np.empty(arrays[0].shape, np.int64)
    for start, stop in _blocks(total.size):  # as Python's own numbers, of which each takes 40 bytes
        summed = sum((array[start:stop].astype(object) for array in flat[1:]), flat[0][start:stop].astype(object))
        try:
            total.reshape(-1)[start:stop] = summed.astype(np.int64)
        except OverflowError:
            raise RefusedError("A sum of whole numbers does not fit into 64 bits.") from None
    return total
