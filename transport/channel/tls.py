"""TLS: credentials from PEM files, and why a handshake failed. Source: ours."""

from __future__ import annotations

import logging
import os
import socket
import ssl
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from nnunet_fed.addresses import host_and_port
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.study.site import Site
from nnunet_fed.transport.channel.allocator import SITE, keep_buffers
from nnunet_fed.transport.channel.options import CHANNEL_OPTIONS, require_loopback
from nnunet_fed.transport.channel.proxy import VARIABLES, ProxyRefusalError, proxy_for, proxy_options

if TYPE_CHECKING:
    from nnunet_fed.certificates.x509 import Certificate  # it imports a library that plain text does not need

logger = logging.getLogger(__name__)

RENEWAL_DAYS = 30.0
"""So long before a certificate expires its owner is reminded."""
PROBE_SECONDS = 5.0

UNKNOWN_AUTHORITY = {18, 19, 20, 21}
"""OpenSSL's X509_V_ERR_ codes for a certificate that no known authority has signed."""
EXPIRED, NOT_YET_VALID, WRONG_HOST, WRONG_ADDRESS = 10, 9, 62, 64


@dataclass(frozen=True)
class Keys:
    """Checked content of a :class:`KeyFiles`, as PEM, and what the certificate says."""

    files: KeyFiles
    certificate: bytes
    key: bytes
    ca: bytes
    owner: Certificate


@dataclass(frozen=True)
class KeyFiles:
    """The PEM files with which a site, or the coordinator, shows who it is."""

    certificate: Path
    """Its own, and those of authorities between it and the one that the others know."""
    key: Path
    """The certificate's private key."""
    ca: Path
    """The authorities whose certificates it accepts."""

    @classmethod
    def of(cls, site: Site) -> KeyFiles:
        """A site's; raises :class:`ConfigurationError` if it has none."""
        if site.certificate is None or site.key is None or site.ca is None:
            raise ConfigurationError(
                "site.toml does not say how to reach the coordinator: give certificate, key and ca ('nnunet_fed certs' "
                "makes these files), or 'insecure = true' for a coordinator on this machine."
            )
        return cls(site.certificate, site.key, site.ca)

    @classmethod
    def given(cls, certificate: Path | None, key: Path | None, ca: Path | None) -> KeyFiles | None:
        """Of a command line: all three or none; raises :class:`ConfigurationError`."""
        if certificate is None and key is None and ca is None:
            return None
        if certificate is None or key is None or ca is None:
            raise ConfigurationError("--cert, --key and --ca go together: give all three.")
        return cls(certificate, key, ca)

    def read(self) -> Keys:
        """Read and check the files; a certificate that ends soon is logged.

        Raises:
            ConfigurationError: a file is missing or damaged, others could read the key, it is not the certificate's,
                or a certificate is not valid now.
        """
        from nnunet_fed.certificates.x509 import read_certificates, read_private_key, to_der

        certificate, key, ca = (_content(path) for path in (self.certificate, self.key, self.ca))
        owner = read_certificates(certificate, self.certificate)[0]
        _check_private(self.key)
        if to_der(read_private_key(key, self.key).public_key()) != owner.public_key:
            raise ConfigurationError(
                f"The private key {self.key} does not belong to the certificate {self.certificate}: name two files "
                "that were made together."
            )
        owner.check_dates(self.certificate)
        if not any(authority.is_authority for authority in read_certificates(ca, self.ca)):
            raise ConfigurationError(f"{self.ca} holds no authority's certificate: name the study's ca.pem.")
        if owner.days_left < RENEWAL_DAYS:
            logger.warning(
                "the certificate %s ends in %.0f days: renew it (docs/security.md)", self.certificate, owner.days_left
            )
        return Keys(self, certificate, key, ca, owner)


def check_security(site: Site) -> None:
    """See that a site can show who it is, or needs not; raises :class:`ConfigurationError`. Opens nothing."""
    if site.insecure:
        require_loopback(site.coordinator)
    else:
        KeyFiles.of(site).read()


def check_name(site: Site) -> None:
    """See that a site's certificate is its own; raises :class:`ConfigurationError`."""
    if site.insecure:
        return
    files = KeyFiles.of(site)
    owner = files.read().owner
    if owner.name != site.name:
        raise ConfigurationError(
            f"site.toml says name = '{site.name}', but the certificate {files.certificate} is of '{owner.name}': a "
            "site's name is what its certificate says. Correct one of them."
        )
    if not owner.calls:
        raise ConfigurationError(f"The certificate {files.certificate} is not for calling others (clientAuth).")


def open_channel(site: Site, peer: str | None = None) -> grpc.Channel:
    """A channel to the coordinator or the peer of this name, through a proxy if there is one.

    The process keeps the memory of messages from then on (:mod:`nnunet_fed.transport.channel.allocator`).

    Raises:
        ConfigurationError: a file for TLS is missing or wrong.
    """
    keep_buffers(SITE)
    address = site.coordinator if peer is None else site.peers[peer]
    options = [*CHANNEL_OPTIONS, *proxy_options(proxy_for(address))]
    if site.insecure:
        return grpc.insecure_channel(address, options=options)
    keys = KeyFiles.of(site).read()
    credentials = grpc.ssl_channel_credentials(keys.ca, keys.key, keys.certificate)
    name = [("grpc.ssl_target_name_override", site.server_name)] if site.server_name and peer is None else []
    return grpc.secure_channel(address, credentials, options=[*options, *name])


def server_credentials(files: KeyFiles, check: Callable[[Keys], None]) -> grpc.ServerCredentials:
    """Credentials that demand a certificate of whoever calls. Renewed files are taken over with the next connection.

    Args:
        files: the server's.
        check: raises :class:`ConfigurationError` if they are not the right ones.

    Raises:
        ConfigurationError: see :meth:`KeyFiles.read`; as ``check``; or the certificate names no host.
    """
    stamp = _stamp(files)  # before they are read, lest a change in between is missed
    keys = _server_keys(files, check)

    def renewed() -> Any:
        nonlocal stamp
        found = _stamp(files)
        if found == stamp:
            return None
        try:
            configuration = _configuration(_server_keys(files, check))
        except ConfigurationError as error:  # perhaps half of the files are there; what was valid goes on
            logger.error("the renewed certificate is not taken over: %s", error)
            return None
        stamp = found
        logger.info("the renewed certificate in %s is taken over", files.certificate)
        return configuration

    return grpc.dynamic_ssl_server_credentials(_configuration(keys), renewed, require_client_authentication=True)


def _configuration(keys: Keys) -> Any:
    return grpc.ssl_server_certificate_configuration([(keys.key, keys.certificate)], keys.ca)


def _server_keys(files: KeyFiles, check: Callable[[Keys], None]) -> Keys:
    keys = files.read()
    check(keys)
    if not keys.owner.hosts or not keys.owner.serves:
        raise ConfigurationError(
            f"The certificate {files.certificate} names no host at which others reach its owner (subjectAltName, "
            "serverAuth), so no site would accept it. Make one with --host."
        )
    return keys


def _stamp(files: KeyFiles) -> list[tuple[int, int] | None]:
    return [_changed(path) for path in (files.certificate, files.key, files.ca)]


def _changed(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}. 'nnunet_fed certs' makes it.") from None


def _check_private(path: Path) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if os.name != "posix" or not mode & 0o037:
        return
    remedy = f"Close it with 'chmod 600 {path}'; reading may be granted to a group (640), more may not."
    if not _can_be_closed(path):
        remedy = (
            "It cannot be closed there, on a read-only mount or as another user's file, as in a container. Have it "
            "mounted with a mode of its own (Kubernetes: 'defaultMode: 0400' of the secret; Docker: 'mode: 0400' and "
            f"'uid' of the secret), or copy it when the container starts, 'install -m 600 {path} /run/key.pem', and "
            "name the copy as 'key' in site.toml, or with --key."
        )
    raise ConfigurationError(
        f"The private key {path} has the mode {mode:o}: whoever can read it can take part under its name. {remedy}"
    )


def _can_be_closed(path: Path) -> bool:
    """Whether ``chmod`` would work."""
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        return False
    return os.geteuid() in (0, path.stat().st_uid)


def diagnose(site: Site) -> str | None:
    """Why a coordinator that listens cannot be talked to, as a sentence; ``None``: TLS is not the reason.

    gRPC tells a failed handshake and a dead coordinator apart in its log only. So this makes a connection of its own.
    """
    name = site.server_name or host_and_port(site.coordinator)[0]
    try:
        return _plain_text(site) if site.insecure else _handshake(site, name)
    except ProxyRefusalError as error:
        return _not_let_through(site, error) if error.lasts else None
    except (OSError, ssl.SSLError):  # it does not listen, or the connection broke: another try may help
        return None


def _not_let_through(site: Site, error: ProxyRefusalError) -> str:
    return (
        f"The proxy {error.address} ({VARIABLES}) does not let this site through to {site.coordinator}: it says "
        f"'{error.answer}'. Let its operator allow CONNECT to this host and port, or put the host into "
        "no_proxy if the site reaches it directly."
    )


def _handshake(site: Site, name: str) -> str | None:
    files = KeyFiles.of(site)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # as gRPC does
    context.set_alpn_protocols(["h2"])
    context.load_verify_locations(files.ca)
    context.load_cert_chain(files.certificate, files.key)
    try:
        with connect(site.coordinator) as plain, context.wrap_socket(plain, server_hostname=name) as secured:
            if secured.recv(1):  # HTTP/2 servers speak first
                return None
    except ssl.SSLCertVerificationError as error:
        return _unacceptable(site, name, error)
    except ssl.SSLError as error:
        if error.reason == "WRONG_VERSION_NUMBER":
            return f"What listens at {site.coordinator} speaks no TLS. Is it the coordinator, with --cert and --key?"
        raise
    return (
        f"The coordinator at {site.coordinator} does not accept this site's certificate {files.certificate}: another "
        "authority has signed it than the coordinator's --ca, or it has expired by the coordinator's clock. Its "
        "operator finds the reason in the log."
    )


def _unacceptable(site: Site, name: str, error: ssl.SSLCertVerificationError) -> str:
    shown = _shown(site.coordinator)
    whose = f"The certificate of the coordinator at {site.coordinator}"
    if error.verify_code in UNKNOWN_AUTHORITY:
        return (
            f"{whose} is not signed by an authority in {site.ca}. Is it the ca.pem of this study, and does nothing in "
            "between (a proxy that inspects TLS) answer instead?"
        )
    if error.verify_code == EXPIRED:
        return f"{whose} expired on {shown.ends:%Y-%m-%d %H:%M} UTC. Let its operator renew it."
    if error.verify_code == NOT_YET_VALID:
        return f"{whose} is valid from {shown.begins:%Y-%m-%d %H:%M} UTC on. Is this machine's clock right?"
    if error.verify_code in (WRONG_HOST, WRONG_ADDRESS):
        return (
            f"{whose} is for {', '.join(shown.hosts) or 'no host'}, not for {name}. Use one of these in site.toml, as "
            "'coordinator', or as 'server_name' if a tunnel leads there."
        )
    return f"{whose} is not acceptable: {error.verify_message}."


def _shown(address: str) -> Certificate:
    """The certificate that is shown at an address, whoever has signed it."""
    from nnunet_fed.certificates.x509 import read_certificates

    with connect(address) as plain, _unverified().wrap_socket(plain) as secured:
        der = secured.getpeercert(binary_form=True)
    return read_certificates(ssl.DER_cert_to_PEM_cert(der or b"").encode(), f"What is shown at {address}")[0]


def _plain_text(site: Site) -> str | None:
    try:
        with connect(site.coordinator) as plain, _unverified().wrap_socket(plain):
            pass
    except ssl.SSLError:
        return None
    return (
        f"The coordinator at {site.coordinator} speaks TLS, and this site does not: it needs certificate, key and ca "
        "instead of 'insecure = true' ('nnunet_fed certs' makes these files)."
    )


def connect(address: str) -> socket.socket:
    """A connection to ``host:port``, through the proxy if there is one; raises :class:`OSError`."""
    proxy = proxy_for(address)
    if proxy is not None:
        return proxy.connect(*host_and_port(address), PROBE_SECONDS)
    return socket.create_connection(host_and_port(address), timeout=PROBE_SECONDS)


def _unverified() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context
