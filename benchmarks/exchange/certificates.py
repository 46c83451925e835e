"""Certificates for a server on this machine and those who call it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def certificates(names: Sequence[str], folder: Path) -> list[dict[str, Path]]:
    """Certificate, key and the authority's certificate for each of these, by name; the first one is the server."""
    from nnunet_fed.certificates.authority import Authority

    authority = Authority.create(folder / "authority", "exchange", 10)
    made = [authority.site(name, [] if number else ["127.0.0.1"], 5, False) for number, name in enumerate(names)]
    return [{what: own / f"{what}.pem" for what in ("certificate", "key", "ca")} for own in made]
