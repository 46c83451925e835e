"""What the coordinator does with contributions: check their content, and reduce those of one collective."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from nnunet_fed.errors import RefusedError
from nnunet_fed.payload import decode, encode, exact_sum, layout_of, mean_payload, measure, open_payload, schema_of

Verb = Literal["mean", "sum", "gather"]


def check_content(verb: Verb, path: Path) -> str | None:
    """The schema of a payload as JSON (``None`` for gathered values); raises :class:`RefusedError`."""
    if verb == "gather":
        try:
            json.loads(path.read_bytes())
        except ValueError:
            raise RefusedError("A gathered value is no JSON.") from None
        return None
    tensors = open_payload(path)
    if verb == "sum" and list(tensors) != ["value"]:
        raise RefusedError("A sum takes one array.")
    if verb == "mean" and any(not np.issubdtype(array.dtype, np.floating) for array in tensors.values()):
        raise RefusedError("A mean takes floating-point tensors only.")
    return json.dumps(schema_of(layout_of(tensors)), sort_keys=True)


def write_result(verb: str, files: Mapping[str, Path], weights: Sequence[float], out: Path) -> tuple[str, int]:
    """Reduce checked payloads into a file, which appears once it is complete.

    Args:
        verb: ``mean``, ``sum`` or ``gather``.
        files: payloads by site, in the order of the names.
        weights: of the sites, in the same order; a mean's only.
        out: the result's file.

    Returns:
        Digest and size of the result.
    """
    part = out.with_name(out.name + ".part")
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
    part.replace(out)
    return written
