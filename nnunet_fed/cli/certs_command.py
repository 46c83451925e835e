"""``nnunet_fed certs``: a study's certificate authority, and the keys and certificates of those who take part."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nnunet_fed.certificates import AUTHORITY_DAYS, LONGEST_DAYS, SITE_DAYS
from nnunet_fed.certificates.deny_list import DenyList
from nnunet_fed.errors import ConfigurationError

if TYPE_CHECKING:
    from nnunet_fed.certificates.x509 import Certificate

app = typer.Typer(
    name="certs",
    help="Make and show the certificates with which sites and coordinator know each other (TLS).",
    no_args_is_help=True,
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The authority's folder.")]
SiteName = Annotated[str, typer.Argument(metavar="NAME", help="The site's, as in federation.toml; or coordinator.")]
Hosts = Annotated[
    list[str] | None,
    typer.Option("--host", metavar="NAME_OR_ADDRESS", help="Where others reach it; repeat for more."),
]
SiteDays = Annotated[int, typer.Option("--days", min=1, max=LONGEST_DAYS, help="How long it is valid.")]
Renew = Annotated[bool, typer.Option("--renew", help="Make a new one, for the same name.")]


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    name: Annotated[str, typer.Option(metavar="STUDY", help="What stands in the certificate.")] = "nnunet_fed",
    days: Annotated[int, typer.Option(min=1, max=LONGEST_DAYS, help="How long it is valid.")] = AUTHORITY_DAYS,
) -> None:
    """Make a study's certificate authority. Whoever has its folder can let others in: keep it off the network."""
    from nnunet_fed.certificates.authority import Authority

    authority = Authority.create(folder, name, days)
    typer.echo(
        f"{folder / 'ca.pem'}: for everybody who takes part, valid until {authority.certificate.ends:%Y-%m-%d}\n"
        f"{folder / 'ca.key'}: keep it secret\n"
        f"{folder / 'revoked.txt'}: for the coordinator's --revoked"
    )


@app.command()
def site(folder: Folder, name: SiteName, host: Hosts = None, days: SiteDays = SITE_DAYS, renew: Renew = False) -> None:
    """Make a key and a certificate for a site, or (NAME coordinator) for the coordinator."""
    from nnunet_fed.certificates.authority import Authority

    made = Authority(folder).site(name, host or (), days, renew)
    typer.echo(f"{made}: certificate.pem, key.pem and ca.pem for '{name}'. Hand them over on a way that nobody reads.")


@app.command()
def request(
    name: SiteName,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where key and request go.")],
    renew: Annotated[bool, typer.Option("--renew", help="Make a request for the key that is there.")] = False,
) -> None:
    """At a site: make a key, which stays there, and a request for a certificate."""
    from nnunet_fed.certificates.authority import make_request
    from nnunet_fed.certificates.x509 import fingerprint

    path, key = make_request(name, out, renew)
    typer.echo(
        f"{path}: send this to the study's authority, and put the certificate.pem and ca.pem that it answers with "
        f"beside it.\nFingerprint of the key, for the telephone: {fingerprint(key)}"
    )


@app.command()
def sign(
    folder: Folder,
    request: Annotated[Path, typer.Argument(metavar="REQUEST.csr", help="What the site has sent.")],
    name: Annotated[str, typer.Option(metavar="NAME", help="The site that has sent it; must be the request's name.")],
    host: Hosts = None,
    days: SiteDays = SITE_DAYS,
    renew: Renew = False,
) -> None:
    """Sign a site's request. Compare the fingerprint with the site's before you send the certificate."""
    from nnunet_fed.certificates.authority import Authority
    from nnunet_fed.certificates.x509 import fingerprint, read_certificates

    made = Authority(folder).sign(request, name, host or (), days, renew)
    certificate = read_certificates((made / "certificate.pem").read_bytes(), made)[0]
    typer.echo(
        f"{made}: certificate.pem and ca.pem for '{name}'\n"
        f"Fingerprint of the key, for the telephone: {fingerprint(certificate.public_key)}"
    )


@app.command()
def show(
    path: Annotated[Path, typer.Argument(metavar="FILE|DIR", help="A PEM file, or an authority's folder.")],
) -> None:
    """List certificates: whose, serial numbers, how long they are valid, for which hosts."""
    from nnunet_fed.certificates.authority import Authority
    from nnunet_fed.certificates.x509 import read_certificates

    revoked: DenyList | None = None
    if path.is_dir():
        authority = Authority(path)
        certificates = [authority.certificate, *authority.issued()]
        revoked = DenyList(path / "revoked.txt")
    else:
        try:
            certificates = read_certificates(path.read_bytes(), path)
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be read: {error.strerror}.") from None
    for certificate in certificates:
        typer.echo(_line(certificate, revoked))


@app.command()
def revoke(
    folder: Folder,
    who: Annotated[str, typer.Argument(metavar="NAME_OR_SERIAL", help="A site, or one certificate.")],
) -> None:
    """Put certificates on the deny list, which a running coordinator reads again (--revoked)."""
    from nnunet_fed.certificates.authority import Authority

    for certificate in (revoked := Authority(folder).revoke(who)):
        typer.echo(f"revoked: {certificate.serial} of '{certificate.name}'")
    typer.echo(
        f"{len(revoked)} added to {folder / 'revoked.txt'}; it counts where the coordinator reads it (--revoked)."
    )


def _line(certificate: Certificate, revoked: DenyList | None) -> str:
    facts = [
        f"{certificate.begins:%Y-%m-%d} to {certificate.ends:%Y-%m-%d}",
        f"{certificate.days_left:.0f} days left" if certificate.days_left > 0 else "expired",
        f"serial number {certificate.serial}",
    ]
    if certificate.is_authority:
        facts.append("an authority")
    if certificate.hosts:
        facts.append(f"at {' '.join(certificate.hosts)}")
    if revoked is not None and certificate.serial in revoked:
        facts.append("revoked")
    return f"{certificate.name}: {', '.join(facts)}"
