"""What stands in certificates and private keys, and files for them. Source: ours; the formats are X.509's (RFC 5280).

Only this module and :mod:`nnunet_fed.certificates.authority` import ``cryptography``: import them late, plain text
needs neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.files import write_bytes

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey
"""The kinds that every TLS library can use."""
SMALLEST_RSA_KEY = 2048
"""Bits."""
UNUSABLE = (
    "a key that is not accepted: make one on the elliptic curve P-256, or an RSA key of "
    f"{SMALLEST_RSA_KEY} bits or more"
)


@dataclass(frozen=True)
class Certificate:
    """What a certificate says."""

    name: str
    """Its common name: the site's name. Empty if there is none, or more than one."""
    serial: str
    """Serial number, hexadecimal, capitals."""
    begins: datetime
    ends: datetime
    """Validity, in UTC."""
    hosts: tuple[str, ...]
    """DNS names and addresses at which its owner may be reached (subject alternative names)."""
    is_authority: bool
    """It may sign others."""
    serves: bool
    """Its owner may be reached by others (extended key usage)."""
    calls: bool
    """Its owner may reach others."""
    public_key: bytes
    """DER."""
    weakness: str
    """What is wrong with the key, as a sentence's end; empty: it is of a kind and length that is accepted. Authorities
    may have keys of other kinds, on which the same length of RSA is asked for."""

    @classmethod
    def of(cls, certificate: x509.Certificate) -> Certificate:
        """Read a certificate; raises :class:`ValueError` if it is malformed."""
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        extensions = {extension.oid: extension.value for extension in certificate.extensions}
        constraints = extensions.get(x509.BasicConstraints.oid)
        usage = extensions.get(x509.ExtendedKeyUsage.oid)
        uses = set(usage) if isinstance(usage, x509.ExtendedKeyUsage) else {ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}
        is_authority = isinstance(constraints, x509.BasicConstraints) and constraints.ca
        anything = ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE in uses
        return cls(
            name=str(names[0].value) if len(names) == 1 else "",
            serial=f"{certificate.serial_number:X}",
            begins=certificate.not_valid_before_utc,
            ends=certificate.not_valid_after_utc,
            hosts=_hosts(extensions.get(x509.SubjectAlternativeName.oid)),
            is_authority=is_authority,
            serves=anything or ExtendedKeyUsageOID.SERVER_AUTH in uses,
            calls=anything or ExtendedKeyUsageOID.CLIENT_AUTH in uses,
            public_key=to_der(certificate.public_key()),
            weakness=_weakness(certificate.public_key(), is_authority),
        )

    @property
    def days_left(self) -> float:
        """Days until it expires; negative once it has."""
        return (self.ends - datetime.now(timezone.utc)).total_seconds() / 86400

    def check_key(self, place: object) -> None:
        """Raise :class:`ConfigurationError` unless its key is strong enough; ``place`` says where it stands."""
        if self.weakness:
            raise ConfigurationError(f"{place} has {self.weakness}.")

    def check_dates(self, place: object) -> None:
        """Raise :class:`ConfigurationError` unless it is valid now; ``place`` says where it stands."""
        if self.days_left <= 0:
            raise ConfigurationError(
                f"{place}: the certificate of '{self.name}' expired on {self.ends:%Y-%m-%d %H:%M} UTC. Renew it "
                "(docs/security.md)."
            )
        if self.begins > datetime.now(timezone.utc):
            raise ConfigurationError(
                f"{place}: the certificate of '{self.name}' is valid from {self.begins:%Y-%m-%d %H:%M} UTC on, which "
                "is yet to come. Is this machine's clock right?"
            )


def _hosts(names: object) -> tuple[str, ...]:
    if not isinstance(names, x509.SubjectAlternativeName):
        return ()
    addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    return (*names.get_values_for_type(x509.DNSName), *addresses)


def read_certificates(pem: bytes, place: object) -> list[Certificate]:
    """All certificates of a PEM file, in its order.

    Args:
        pem: the file's content.
        place: where it stands, for what the user reads.

    Raises:
        ConfigurationError: there is none, or a damaged one.
    """
    try:
        return [Certificate.of(certificate) for certificate in x509.load_pem_x509_certificates(pem)]
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigurationError(f"{place} holds no certificate, or a damaged one: name a PEM file.") from None


def read_private_key(pem: bytes, place: object) -> PrivateKey:
    """The private key of a PEM file.

    Raises:
        ConfigurationError: there is none, it is of a kind that gRPC cannot use, or it needs a passphrase.
    """
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except TypeError:
        raise ConfigurationError(
            f"The private key {place} is locked by a passphrase, which nobody could type while it runs: "
            f"'openssl pkey -in {place} -out NEW_FILE' unlocks it."
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigurationError(f"{place} holds no private key, or a damaged one: name a PEM file.") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise _unusable(place)
    as_usable(key.public_key(), place)
    return key


def as_usable(key: PublicKeyTypes, place: object) -> PublicKey:
    """The key, if gRPC's TLS can use it and it is strong enough; else raises :class:`ConfigurationError`."""
    if isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey) and not _weakness(key):
        return key
    raise _unusable(place)


def _weakness(key: PublicKeyTypes, of_authority: bool = False) -> str:
    if isinstance(key, rsa.RSAPublicKey):
        accepted = key.key_size >= SMALLEST_RSA_KEY
    elif isinstance(key, ec.EllipticCurvePublicKey):
        accepted = of_authority or isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1)
    else:
        accepted = of_authority
    return "" if accepted else UNUSABLE


def _unusable(place: object) -> ConfigurationError:
    return ConfigurationError(f"{place} has {UNUSABLE}.")


def to_der(key: PublicKeyTypes) -> bytes:
    """A public key's bytes, by which keys are compared."""
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def fingerprint(public_key: bytes) -> str:
    """SHA-256 of a public key (DER) in groups of four hexadecimal digits, to be compared on the telephone."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(public_key)
    text = digest.finalize().hex()
    return " ".join(text[start : start + 4] for start in range(0, len(text), 4))


def new_private_key() -> ec.EllipticCurvePrivateKey:
    """A new key on the curve P-256, which every TLS library has."""
    return ec.generate_private_key(ec.SECP256R1())


def write_private_key(path: Path, key: ec.EllipticCurvePrivateKey, replace: bool = False) -> None:
    """Write a key into a file that its owner alone can read. Raises :class:`FileExistsError` unless ``replace``."""
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_file(path, pem, mode=0o600, replace=replace)


def write_file(path: Path, content: bytes, mode: int = 0o644, replace: bool = False) -> None:
    """Write a file of this mode, as a whole or not at all. Raises :class:`FileExistsError` unless ``replace``."""
    if not replace:
        path.touch(mode, exist_ok=False)  # of two who make it at a time, one is told
    write_bytes(path, content, mode=mode)
