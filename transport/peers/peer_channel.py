"""Connections to peers: who is called must be the site that is meant, with a certificate that still counts.

gRPC does not tell a caller which certificate it was shown. So a connection of our own looks at it before, and gRPC then
accepts that certificate and no other. Source: ours.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc

from nnunet_fed.certificates.deny_list import DenyList
from nnunet_fed.errors import ConfigurationError, RefusedError, UnreachableError
from nnunet_fed.study.address import Address
from nnunet_fed.study.site import Site
from nnunet_fed.transport.channel.tls import KeyFiles, connect, open_channel


class PeerChannels:
    """Opens channels to the peers of a site.

    Args:
        site: whose settings say where they are, and with which files it shows who it is.

    Raises:
        ConfigurationError: the deny list cannot be read.
    """

    def __init__(self, site: Site):
        self._site = site
        self._revoked = None if site.revoked is None else DenyList(site.revoked)

    @contextmanager
    def to(self, peer: str) -> Iterator[tuple[grpc.Channel, Callable[[], bool]]]:
        """A channel to a peer, and whether its certificate has been revoked since.

        Raises:
            RefusedError: what is shown there is another's certificate, or a revoked one.
            UnreachableError: nobody answers there, or nobody with a certificate of the study.
            ConfigurationError: a file for TLS is missing or wrong, or the deny list cannot be read.
        """
        if self._site.insecure:
            with open_channel(self._site, peer) as channel:
                yield channel, lambda: False
            return
        from nnunet_fed.certificates.x509 import read_certificates

        shown = self._shown(peer)
        certificate = read_certificates(shown, f"What site '{peer}' shows")[0]
        certificate.check_key(f"The certificate of site '{peer}'")
        if certificate.name != peer:
            raise RefusedError(
                f"At {self._site.peers[peer]}, the address of site '{peer}', '{certificate.name}' shows its "
                "certificate. Correct [peers] in site.toml, at all sites."
            )
        if self._is_revoked(certificate.serial):
            raise RefusedError(
                f"The certificate of site '{peer}' (serial number {certificate.serial}) has been revoked: nothing goes "
                "there, and nothing is taken from there."
            )

        def revoked() -> bool:
            try:
                return self._is_revoked(certificate.serial)
            except ConfigurationError:  # half a list, perhaps; the next connection is not made before it can be read
                return False

        with open_channel(self._site, peer, shown) as channel:
            yield channel, revoked

    def _is_revoked(self, serial: str) -> bool:
        return self._revoked is not None and serial in self._revoked

    def _shown(self, peer: str) -> bytes:
        """The certificate that is shown at a peer's address, as PEM; TLS has checked its authority, dates and host."""
        address, files = self._site.peers[peer], KeyFiles.of(self._site)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # as gRPC does
        context.set_alpn_protocols(["h2"])
        try:
            context.load_verify_locations(files.ca)
            context.load_cert_chain(files.certificate, files.key)
            with (
                connect(address) as plain,
                context.wrap_socket(plain, server_hostname=Address.parse(address).host) as one,
            ):
                return ssl.DER_cert_to_PEM_cert(one.getpeercert(binary_form=True) or b"").encode()
        except OSError as error:
            raise UnreachableError(f"Site '{peer}' at {address} does not answer: {error}.") from None
