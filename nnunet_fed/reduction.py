"""What the coordinator does with the contributions of one collective. Source: ours."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from nnunet_fed.payload import decode, encode, exact_sum, mean_payload, measure, open_payload
from nnunet_fed.spool import PARTIAL


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
        RefusedError: a sum does not fit into 64 bits.
    """
    part = out.with_name(out.name + PARTIAL)
    try:
        with part.open("wb") as file:
            if verb == "mean":
                written = mean_payload([open_payload(path) for path in files.values()], weights, file)
            else:
                if verb == "sum":
                    arrays = [decode(path.read_bytes())["value"] for path in files.values()]
                    result = b"".join(encode({"value": exact_sum(arrays)}))
                else:
                    result = json.dumps({site: json.loads(path.read_bytes()) for site, path in files.items()}).encode()
                file.write(result)
                written = measure([result])
    except BaseException:  # of a full disk, above all, which needs the room
        part.unlink(missing_ok=True)
        raise
    part.replace(out)
    return written
