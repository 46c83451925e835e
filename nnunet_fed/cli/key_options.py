"""Options of a command line that name the files for TLS, for ``coordinator`` and ``status`` alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CertificateFile = Annotated[Path | None, typer.Option("--cert", metavar="FILE", help="Certificate (PEM), for TLS.")]
KeyFile = Annotated[Path | None, typer.Option("--key", metavar="FILE", help="Its private key.")]
AuthorityFile = Annotated[
    Path | None, typer.Option("--ca", metavar="FILE", help="Authorities whose certificates are accepted.")
]
