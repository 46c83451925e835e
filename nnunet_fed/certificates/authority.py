"""The certificate authority of a study: a folder with its key, and all that it has signed. Source: ours.

What it signs follows RFC 5280: a site may call, and with host names be called; it cannot sign others.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nnunet_fed.addresses import without_brackets
from nnunet_fed.certificates import AUTHORITY_DAYS, SITE_DAYS
from nnunet_fed.certificates.deny_list import HEADER, DenyList, deny
from nnunet_fed.certificates.x509 import (
    Certificate,
    PublicKey,
    as_usable,
    new_private_key,
    read_certificates,
    read_private_key,
    to_der,
    write_file,
    write_private_key,
)
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.files import new_folder, write_text
from nnunet_fed.study.federation import COORDINATOR, SITE_NAME

CLOCK_SKEW = timedelta(hours=1)
"""By so much certificates are valid before they are made: clocks differ."""
LONGEST_NAME = 64
"""Letters of a name in a certificate (RFC 5280, appendix A.1)."""
LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
HOST_NAME = re.compile(rf"(?=.{{1,253}}$){LABEL}(\.{LABEL})*")
AUTHORITY, AUTHORITY_KEY, DENIED = "ca.pem", "ca.key", "revoked.txt"
CERTIFICATE, KEY, REQUEST = "certificate.pem", "key.pem", "request.csr"


class Authority:
    """An authority in its folder.

    ``ca.pem`` and ``ca.key``; ``issued`` with every certificate that it has signed; ``sites`` with a folder for each
    site, to be handed over; ``revoked.txt``, the deny list.

    Raises:
        ConfigurationError: the folder holds no authority.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            pem, key = ((folder / name).read_bytes() for name in (AUTHORITY, AUTHORITY_KEY))
        except OSError as error:
            raise ConfigurationError(
                f"{folder} holds no certificate authority ({error.strerror}: {error.filename}). "
                "'nnunet_fed certs init DIR' makes one."
            ) from None
        self.certificate = read_certificates(pem, folder / AUTHORITY)[0]
        self.certificate.check_dates(folder / AUTHORITY)
        self._signer = x509.load_pem_x509_certificate(pem)
        self._key = read_private_key(key, folder / AUTHORITY_KEY)

    @classmethod
    def create(cls, folder: Path, study: str, days: int = AUTHORITY_DAYS) -> Authority:
        """Make one in a new or empty folder, which its owner alone can enter.

        Args:
            folder: where.
            study: what stands in the certificate.
            days: how long it is valid.

        Raises:
            ConfigurationError: the folder is not empty, or the study's name is too long.
        """
        if not 1 <= len(study) <= LONGEST_NAME:
            raise ConfigurationError(f"--name {study!r}: a certificate takes a name of 1 to {LONGEST_NAME} letters.")
        if (folder / AUTHORITY_KEY).exists():
            raise ConfigurationError(f"{folder} holds a certificate authority already: name another folder.")
        new_folder(folder)
        folder.chmod(0o700)
        key = new_private_key()
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, study),
                x509.NameAttribute(NameOID.COMMON_NAME, "nnunet_fed certificate authority"),
            ]
        )
        builder = _builder(subject, subject, key.public_key(), datetime.now(timezone.utc) + timedelta(days=days))
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        certificate = builder.add_extension(_key_usage(signs=True), critical=True).sign(key, hashes.SHA256())
        write_private_key(folder / AUTHORITY_KEY, key)
        write_file(folder / AUTHORITY, certificate.public_bytes(Encoding.PEM))
        write_text(folder / DENIED, HEADER)
        for name in ("issued", "sites"):
            (folder / name).mkdir()
        return cls(folder)

    def site(self, name: str, hosts: Sequence[str] = (), days: int = SITE_DAYS, renew: bool = False) -> Path:
        """Make a key and a certificate for a site, or for the coordinator.

        Args:
            name: the site's, as in ``federation.toml``, or ``coordinator``.
            hosts: DNS names and addresses at which others reach it; when renewed, by default those of before.
            days: how long it is valid; no longer than the authority itself.
            renew: replace what was made before, the key included.

        Returns:
            Folder with ``certificate.pem``, ``key.pem`` and ``ca.pem``.

        Raises:
            ConfigurationError: a bad name or host, or there is a certificate and ``renew`` was not given.
        """
        hosts = self._prepare(name, hosts, renew)
        key = new_private_key()
        folder = self._hand_over(name, self._sign(name, key.public_key(), hosts, days))
        write_private_key(folder / KEY, key, replace=renew)
        return folder

    def sign(
        self, request: Path, name: str, hosts: Sequence[str] = (), days: int = SITE_DAYS, renew: bool = False
    ) -> Path:
        """Sign a request that a site has made, whose key stays there; else as :meth:`site`.

        Args:
            request: PEM file.
            name: who is meant to have made it. Nothing but name and key is taken over from the request.
            hosts: see :meth:`site`.
            days: see :meth:`site`.
            renew: see :meth:`site`.

        Raises:
            ConfigurationError: also if the request is damaged, of another name, or for a weak key.
        """
        key = _requested_key(request, name)
        hosts = self._prepare(name, hosts, renew)
        return self._hand_over(name, self._sign(name, key, hosts, days))

    def issued(self, name: str | None = None) -> list[Certificate]:
        """All certificates that it has signed (for one name), the newest last."""
        files = (self.folder / "issued").glob("*.pem")
        certificates = [certificate for file in files for certificate in read_certificates(file.read_bytes(), file)]
        found = [certificate for certificate in certificates if name in (None, certificate.name)]
        return sorted(found, key=lambda certificate: (certificate.begins, certificate.ends))

    def revoke(self, who: str) -> list[Certificate]:
        """Put a site's certificates, or the one with a serial number, on the deny list.

        Returns:
            Those that were not on it.

        Raises:
            ConfigurationError: it has signed no such certificate.
        """
        serial = who.upper().replace(":", "").lstrip("0")
        found = self.issued(who) or [certificate for certificate in self.issued() if certificate.serial == serial]
        if not found:
            raise ConfigurationError(
                f"{self.folder} has signed no certificate for '{who}', nor one with that serial number: "
                f"'nnunet_fed certs show {self.folder}' lists them."
            )
        path = self.folder / DENIED
        denied = DenyList(path)
        new = [certificate for certificate in found if certificate.serial not in denied]
        for certificate in new:
            deny(path, certificate.serial, f"{certificate.name}, {datetime.now():%Y-%m-%d %H:%M}")
        return new

    def _prepare(self, name: str, hosts: Sequence[str], renew: bool) -> Sequence[str]:
        check_name(name)
        before = self.issued(name)
        if before and not renew:
            raise ConfigurationError(
                f"'{name}' has a certificate, valid until {before[-1].ends:%Y-%m-%d}. --renew makes a new one; the old "
                "one is valid until then unless it is revoked."
            )
        if renew and not before:
            raise ConfigurationError(f"'{name}' has no certificate to renew: leave --renew out.")
        if renew and not hosts:
            hosts = before[-1].hosts
        if name == COORDINATOR and not hosts:
            raise ConfigurationError(
                "Give each name and address at which the sites reach the coordinator: --host NAME_OR_ADDRESS."
            )
        return hosts

    def _hand_over(self, name: str, pem: bytes) -> Path:
        folder = self.folder / "sites" / name
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / CERTIFICATE, pem, replace=True)
        write_file(folder / AUTHORITY, (self.folder / AUTHORITY).read_bytes(), replace=True)
        return folder

    def _sign(self, name: str, key: PublicKey, hosts: Sequence[str], days: int) -> bytes:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        ends = min(datetime.now(timezone.utc) + timedelta(days=days), self.certificate.ends)
        uses = [ExtendedKeyUsageOID.CLIENT_AUTH] + ([ExtendedKeyUsageOID.SERVER_AUTH] if hosts else [])
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = (
            _builder(subject, self._signer.subject, key, ends)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(issuer, critical=False)
        )
        if hosts:
            names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
            builder = builder.add_extension(names, critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        pem = certificate.public_bytes(Encoding.PEM)
        write_file(self.folder / "issued" / f"{name}-{certificate.serial_number:X}.pem", pem)
        return pem


def make_request(name: str, folder: Path, renew: bool = False) -> tuple[Path, bytes]:
    """Make a key and a request for a certificate, at a site.

    Args:
        name: the site's.
        folder: where ``key.pem`` and ``request.csr`` go.
        renew: make a new request for the key that is there.

    Returns:
        The request's file, and the public key (DER).

    Raises:
        ConfigurationError: a bad name, or there is a key and ``renew`` was not given.
    """
    check_name(name)
    path = folder / KEY
    if not renew:
        if path.exists():
            raise ConfigurationError(
                f"{path} is there already. --renew makes a request for this key; for a new key name another folder."
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_private_key(path, new_private_key())
    try:
        key = read_private_key(path.read_bytes(), path)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}. Leave --renew out.") from None
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    write_file(folder / REQUEST, request.public_bytes(Encoding.PEM), replace=True)
    return folder / REQUEST, to_der(key.public_key())


def check_name(name: str) -> None:
    """Raise :class:`ConfigurationError` unless it can be the name of a site."""
    if not SITE_NAME.fullmatch(name):
        raise ConfigurationError(f"The name {name!r}: use letters, digits, '_', '-' and '.', at most 63 of them.")


def _requested_key(path: Path, name: str) -> PublicKey:
    try:
        request = x509.load_pem_x509_csr(path.read_bytes())
        valid = request.is_signature_valid
        names = [str(attribute.value) for attribute in request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        key = request.public_key()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigurationError(f"{path} holds no request for a certificate, or a damaged one.") from None
    if not valid:
        raise ConfigurationError(f"{path} is damaged: its signature does not match. Let the site send it again.")
    if names != [name]:
        raise ConfigurationError(
            f"{path} asks for a certificate for {' and '.join(map(repr, names)) or 'nobody'}, --name says '{name}'. "
            "Is it the request of that site?"
        )
    return as_usable(key, path)


def _builder(subject: x509.Name, issuer: x509.Name, key: PublicKey, ends: datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(timezone.utc) - CLOCK_SKEW)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(signs: bool) -> x509.KeyUsage:
    """An authority's key signs certificates and deny lists, a site's proves who it is."""
    return x509.KeyUsage(
        digital_signature=not signs, key_cert_sign=signs, crl_sign=signs, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _general_name(host: str) -> x509.GeneralName:
    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(without_brackets(host)))
    if not HOST_NAME.fullmatch(host):
        raise ConfigurationError(f"--host {host!r} is neither a host's name nor an address, and goes without a port.")
    return x509.DNSName(host)
