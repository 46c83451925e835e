"""Who calls is who the certificate says: real gRPC with mutual TLS over loopback."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID
from google.protobuf.message import Message
from serving import Served, make_study
from typer.testing import CliRunner

from nnunet_fed.certificates import authority as authority_module
from nnunet_fed.certificates.authority import Authority
from nnunet_fed.certificates.x509 import Certificate, read_certificates
from nnunet_fed.cli.app import app
from nnunet_fed.errors import ConfigurationError, RefusedError, UnreachableError
from nnunet_fed.files import PARTIAL
from nnunet_fed.study.site import Site
from nnunet_fed.transport.channel.identity import Identity
from nnunet_fed.transport.channel.tls import KeyFiles, diagnose
from nnunet_fed.transport.coordinator import server as server_module
from nnunet_fed.transport.coordinator.server import CoordinatorServer
from nnunet_fed.transport.proto import federation_pb2 as pb
from nnunet_fed.transport.proto.federation_pb2_grpc import CoordinatorStub
from nnunet_fed.transport.site.client import GrpcCommunicator

Serve = Callable[..., Served]
SERVICE = pb.DESCRIPTOR.services_by_name["Coordinator"]
METHODS = [method.name for method in SERVICE.methods]
HOSTS = ["localhost", "127.0.0.1"]


@dataclass
class Study:
    """Folders with files of all kinds of callers."""

    authority: Authority
    coordinator: Path
    a: Path
    b: Path
    outsider: Path
    """Of the study's authority, but not in the study."""
    watcher: Path
    expired: Path
    """For site a."""
    stranger: Path
    """For site a, by another authority."""

    @property
    def revoked(self) -> Path:
        return self.authority.folder / "revoked.txt"


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    study, other = (Authority.create(tmp_path / name, name) for name in ("study", "other"))
    ours = [study.site("coordinator", HOSTS), *map(study.site, ("a", "b", "outsider", "watcher"))]
    with monkeypatch.context() as patch:
        patch.setattr(authority_module, "CLOCK_SKEW", timedelta(days=3))
        expired = shutil.copytree(study.site("a", days=-1, renew=True), tmp_path / "expired")
    study.site("a", renew=True)
    stranger = other.site("a")
    shutil.copy(study.folder / "ca.pem", stranger)
    return Study(study, *ours, expired, stranger)


def files_in(folder: Path) -> KeyFiles:
    return KeyFiles(*(folder / name for name in ("certificate.pem", "key.pem", "ca.pem")))


@pytest.fixture
def served(serve: Serve, made: Study) -> Served:
    return serve(make_study("ab"), keys=files_in(made.coordinator), revoked=made.revoked)


@contextmanager
def unchanged(served: Served, made: Study) -> Iterator[None]:
    """Whatever happens within changes nothing, and site b is served afterwards."""

    def state() -> dict[str, Any]:
        return {key: value for key, value in served.coordinator.status(record=True).items() if key != "now"}

    before, files = state(), sorted(served.coordinator._store.folder.rglob("*"))
    yield
    assert state() == before
    assert sorted(served.coordinator._store.folder.rglob("*")) == files
    seat = GrpcCommunicator(served.settings("b", made.b))
    assert seat.status()["sites"].keys() == {"a", "b"}
    seat.close()


@contextmanager
def stub(served: Served, folder: Path | None, ca: Path | None = None) -> Iterator[CoordinatorStub]:
    """What somebody has who uses other software than ours."""
    roots = (ca or (folder or Path()) / "ca.pem").read_bytes()
    pair = [(folder / name).read_bytes() for name in ("key.pem", "certificate.pem")] if folder else [None, None]
    with grpc.secure_channel(served.server.address, grpc.ssl_channel_credentials(roots, *pair)) as channel:
        yield CoordinatorStub(channel)


def claim(message: Message, site: str) -> bool:
    """Write a name into every field ``site`` of a message; whether there is one."""
    found = False
    for field in message.DESCRIPTOR.fields:
        if field.name == "site":
            message.site = site  # type: ignore[attr-defined]
            found = True
        elif field.message_type is not None and field.has_presence:
            found |= claim(getattr(message, field.name), site)
    return found


def outcome(stub: CoordinatorStub, name: str, site: str) -> tuple[grpc.StatusCode, str]:
    """Status and text of the answer to a call of one of the service's methods in the name of a site."""
    method = SERVICE.methods_by_name[name]
    request = getattr(pb, method.input_type.name)()
    claim(request, site)
    try:
        answer = getattr(stub, name)(iter([request]) if method.client_streaming else request, timeout=10)
        if method.server_streaming:
            list(answer)
    except grpc.RpcError as error:
        return error.code(), str(error.details())
    return grpc.StatusCode.OK, ""


# ------------------------------------------------------------------------------------------------------------ belonging


def test_sites_exchange_over_mutual_tls(served: Served, made: Study) -> None:
    seats = [served.seat("a", files=made.a), served.seat("b", files=made.b)]

    def exchange(seat: GrpcCommunicator) -> tuple[float, dict[str, Any]]:
        tensors = {"w": np.full(400_000, 1 if seat.site == "a" else 4, np.float32)}
        return float(seat.mean("r/m", tensors, 1 if seat.site == "a" else 2)["w"][-1]), seat.gather("r/x", seat.site)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(exchange, seats)) == [(3.0, {"a": "a", "b": "b"})] * 2
    seats[0].note("happened")
    seats[0].report({"phase": "training"}, wait=True)
    seats[0].leave("done")
    told = GrpcCommunicator(served.settings("watcher", made.watcher)).status(record=True)
    assert told["sites"]["a"]["standing"] == "left"
    assert told["sites"]["a"]["progress"] == {"phase": "training"}
    assert "happened" in [event["text"] for event in told["events"]]


@pytest.mark.parametrize("who", ["watcher", "coordinator"])
def test_who_watches_can_read_the_status_and_nothing_else(served: Served, made: Study, who: str) -> None:
    with unchanged(served, made), stub(served, getattr(made, who)) as watcher:
        for name in METHODS:
            code, text = outcome(watcher, name, who)
            if name == "Status":
                assert code == grpc.StatusCode.OK
            else:
                assert code == grpc.StatusCode.PERMISSION_DENIED, name
                assert f"'{who}' is not a site of the study 'study'" in text


def test_the_coordinators_names_are_no_sites() -> None:
    for name in ("coordinator", "watcher"):
        with pytest.raises(ValueError, match="no site can be called"):
            make_study(["a", name])


# -------------------------------------------------------------------------------------------------------- not belonging


@pytest.mark.parametrize("who", ["nobody", "stranger", "expired"])
def test_strangers_do_not_get_through_the_handshake(served: Served, made: Study, who: str) -> None:
    folder = None if who == "nobody" else getattr(made, who)
    with unchanged(served, made), stub(served, folder, ca=made.a / "ca.pem") as stranger:
        for name in METHODS:
            assert outcome(stranger, name, "a")[0] == grpc.StatusCode.UNAVAILABLE
    with unchanged(served, made), grpc.insecure_channel(served.server.address) as channel:
        assert outcome(CoordinatorStub(channel), "Status", "")[0] == grpc.StatusCode.UNAVAILABLE


def test_who_is_not_in_the_study_is_refused_before_a_payload_is_read(
    serve: Serve, made: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[str] = []
    for name in METHODS:
        monkeypatch.setattr(server_module._Service, name, lambda *_, name=name: reached.append(name))
    served = serve(make_study("ab"), keys=files_in(made.coordinator))
    with stub(served, made.outsider) as outsider:
        for name in METHODS:
            code, text = outcome(outsider, name, "a")
            assert code == grpc.StatusCode.PERMISSION_DENIED, name
            assert "'outsider' is not a site of the study" in text
        chunks = iter([pb.UploadChunk(data=bytes(2**20))] * 50)
        with pytest.raises(grpc.RpcError) as refused:
            outsider.Upload(chunks, timeout=10)
        assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
        assert next(chunks, None) is not None, "the rest was not even asked for"
    assert reached == []


@pytest.mark.parametrize("claimed", ["b", "", "A", "a "])
def test_a_site_cannot_write_in_the_name_of_another(served: Served, made: Study, claimed: str) -> None:
    served.seat("a", files=made.a)
    served.seat("b", files=made.b)
    checked = 0
    with unchanged(served, made), stub(served, made.a) as site:
        for method in SERVICE.methods:
            if not claim(getattr(pb, method.input_type.name)(), "x"):
                continue
            checked += 1
            code, text = outcome(site, method.name, claimed)
            assert code == grpc.StatusCode.PERMISSION_DENIED, method.name
            assert f"The certificate is of 'a', the message says '{claimed}'" in text
    assert checked >= 6


def test_another_name_in_the_middle_of_an_upload(served: Served, made: Study) -> None:
    run = served.seat("a", files=made.a).run
    mine, other = (
        pb.UploadChunk(
            offer=pb.OfferRequest(run=run, key="r/x", site=site, verb="gather", weight=1, size=9, digest="0" * 32)
        )
        for site in "ab"
    )
    with stub(served, made.a) as site, pytest.raises(grpc.RpcError) as refused:
        site.Upload(iter([mine, pb.UploadChunk(data=b"[1]"), other]), timeout=10)
    assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert served.coordinator.status()["open"] == []
    kept = served.coordinator._spool.folder.iterdir()
    assert all(path.suffix == PARTIAL for path in kept), "what came before may go on, nothing is complete"


def test_the_name_in_site_toml_must_be_the_certificates(served: Served, made: Study) -> None:
    with unchanged(served, made), pytest.raises(ConfigurationError, match="name = 'b', but the certificate .* of 'a'"):
        served.seat("b", files=made.a)


# -------------------------------------------------------------------------------------------------- no longer belonging


def test_a_site_is_revoked_while_it_is_connected(served: Served, made: Study) -> None:
    a = served.seat("a", files=made.a)
    a.status()
    made.authority.revoke("a")
    with unchanged(served, made):
        with pytest.raises(RefusedError, match=r"certificate of 'a' \(serial number [0-9A-F]+\) has been revoked"):
            a.status()
        with pytest.raises(RefusedError, match="revoked"):
            a.gather("r/x", 1)
    made.authority.site("a", renew=True)
    served.seat("a", files=made.a).status()


def test_a_deny_list_that_cannot_be_read_lets_nobody_in_until_it_can(
    served: Served, made: Study, caplog: pytest.LogCaptureFixture
) -> None:
    a = served.seat("a", files=made.a)
    good = made.revoked.read_text()
    made.revoked.write_text("what?\n")
    with stub(served, made.a) as site:
        assert outcome(site, "Status", "")[0] == grpc.StatusCode.UNAVAILABLE
    assert "has 'what?' in line 1" in caplog.text
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(a.status)
        while "does not answer" not in caplog.text:
            assert not waiting.done()
        made.revoked.write_text(good)
        assert waiting.result()["attempt"] == 1


def test_a_certificate_that_expires_while_its_site_is_connected(
    served: Served, made: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = served.seat("a", files=made.a)
    with unchanged(served, made), monkeypatch.context() as patch:
        patch.setattr(Certificate, "days_left", property(lambda certificate: -1.0))
        with pytest.raises(RefusedError, match=r"'a' .* expired on \d{4}-.* Renew it"):
            a.status()
        patch.undo()
        a.status()


def with_rsa(study: Authority, folder: Path, bits: int) -> Path:
    """A certificate for site a with an RSA key, as another tool would make it."""
    key = rsa.generate_private_key(65537, bits)
    signing = serialization.load_pem_private_key((study.folder / "ca.key").read_bytes(), None)
    authority = x509.load_pem_x509_certificate((study.folder / "ca.pem").read_bytes())
    now = datetime.now(timezone.utc)
    builder = x509.CertificateBuilder().subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a")]))
    builder = builder.issuer_name(authority.subject).public_key(key.public_key()).serial_number(4711)
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=99))
    shutil.copytree(study.folder / "sites" / "a", folder)
    certificate = builder.sign(signing, hashes.SHA256())  # type: ignore[arg-type]
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(pem)
    return folder


def test_a_short_key_is_refused_wherever_it_is_met(served: Served, made: Study, tmp_path: Path) -> None:
    """A site's own key was looked at, and the keys of those who call were not."""
    good, short = (with_rsa(made.authority, tmp_path / str(bits), bits) for bits in (2048, 1024))
    served.seat("a", files=good).status()
    with pytest.raises(ConfigurationError, match="key that is not accepted"):
        served.seat("a", files=short)
    with unchanged(served, made), stub(served, short) as caller:
        code, text = outcome(caller, "Status", "")
        if code != grpc.StatusCode.UNAVAILABLE:  # gRPC's own TLS may refuse it, too
            assert (code, "RSA key of 2048 bits or more" in text) == (grpc.StatusCode.UNAUTHENTICATED, True)
    parsed = read_certificates((short / "certificate.pem").read_bytes(), "it")[0]
    context = SimpleNamespace(auth_context=lambda: {"x509_pem_cert": [(short / "certificate.pem").read_bytes()]})
    context.peer, context.abort = lambda: "ipv4:127.0.0.1:9", lambda code, text: pytest.fail(f"{code}: {text}")
    with pytest.raises(pytest.fail.Exception, match="UNAUTHENTICATED.*2048 bits or more"):
        Identity(["a"], "").admit("/x/y", context)
    assert parsed.weakness


# ------------------------------------------------------------------------------------------------------ the coordinator


def shown(address: str) -> bytes | None:
    """The certificate that a coordinator shows to whoever connects now."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), 5) as plain, context.wrap_socket(plain) as secured:
        return secured.getpeercert(binary_form=True)


def test_a_renewed_coordinators_certificate_needs_no_restart(
    served: Served, made: Study, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "nnunet_fed")
    a = served.seat("a", files=made.a)
    old, key = shown(served.server.address), (made.coordinator / "key.pem").read_bytes()
    made.authority.site("coordinator", renew=True)
    new_key = (made.coordinator / "key.pem").read_bytes()
    (made.coordinator / "key.pem").write_bytes(key)
    assert shown(served.server.address) == old, "half of the files: what was valid goes on"
    assert "is not taken over: The private key" in caplog.text
    (made.coordinator / "key.pem").write_bytes(new_key)
    assert shown(served.server.address) not in (None, old)
    a.status()
    b = served.seat("b", files=made.b)
    assert b.status()["attempt"] == 1


def test_files_that_a_coordinator_cannot_use(serve: Serve, made: Study, tmp_path: Path) -> None:
    study = make_study("ab")
    with pytest.raises(ConfigurationError, match=r"Give either --cert, --key and --ca .* or --insecure"):
        serve(study, tmp_path / "1", keys=None)
    coordinator = serve(study, tmp_path / "2").coordinator
    keys = files_in(made.coordinator)
    for arguments in ({"insecure": True, "keys": keys}, {"insecure": True, "revoked": made.revoked}):
        with pytest.raises(ConfigurationError, match="Give either"):
            CoordinatorServer(coordinator, "127.0.0.1:0", **arguments)
    with pytest.raises(
        ConfigurationError, match="is the certificate of site 'a': the coordinator needs one of its own"
    ):
        CoordinatorServer(coordinator, "127.0.0.1:0", keys=files_in(made.a))
    with pytest.raises(ConfigurationError, match="names no host"):
        CoordinatorServer(coordinator, "127.0.0.1:0", keys=files_in(made.outsider))
    with pytest.raises(ConfigurationError, match="deny list .* cannot be read"):
        CoordinatorServer(coordinator, "127.0.0.1:0", keys=keys, revoked=tmp_path / "nothing")
    CoordinatorServer(coordinator, "0.0.0.0:0", keys=keys).stop(0)


# ------------------------------------------------------------------------------------------------------------ at a site


def refusal(settings: Site) -> str:
    """In what a site's first call ends, with ten minutes' patience."""
    seat = GrpcCommunicator(settings.model_copy(update={"connect_minutes": 10}))
    with pytest.raises(UnreachableError) as refused:
        seat.join("planning")
    seat.close()
    return str(refused.value)


def test_the_coordinator_is_of_another_authority(served: Served, made: Study, tmp_path: Path) -> None:
    with unchanged(served, made):
        told = refusal(served.settings("a", made.a, ca=tmp_path / "other" / "ca.pem"))
    assert f"is not signed by an authority in {tmp_path / 'other' / 'ca.pem'}" in told


def test_the_coordinator_does_not_know_this_sites_authority(served: Served, made: Study) -> None:
    with unchanged(served, made):
        told = refusal(served.settings("a", made.stranger))
    assert "does not accept this site's certificate" in told


def test_the_coordinator_has_another_name(served: Served, made: Study) -> None:
    with unchanged(served, made):
        told = refusal(served.settings("a", made.a, server_name="example.org"))
    assert "is for localhost, 127.0.0.1, not for example.org" in told
    served.seat("a", files=made.a, tls={"server_name": "localhost"})


def test_the_coordinators_certificate_has_expired(made: Study, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(authority_module, "CLOCK_SKEW", timedelta(days=3))
        made.authority.site("coordinator", days=-1, renew=True)
        patch.setattr(Certificate, "check_dates", lambda *_: None)
        shown(served.server.address)  # takes the expired certificate over
    told = refusal(served.settings("a", made.a))
    assert "expired on" in told
    assert "Let its operator renew it" in told


def test_only_one_side_speaks_tls(serve: Serve, served: Served, made: Study, tmp_path: Path) -> None:
    assert "speaks TLS, and this site does not" in refusal(served.settings("a"))
    plain = serve(make_study("ab"), tmp_path / "plain")
    assert "speaks no TLS" in refusal(plain.settings("a", made.a))


def test_nothing_is_wrong_with_tls(served: Served, made: Study) -> None:
    assert diagnose(served.settings("a", made.a)) is None
    served.server.stop(0)
    assert diagnose(served.settings("a", made.a)) is None
    assert diagnose(served.settings("a")) is None


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("", r"site.toml does not say how to reach.*give certificate, key and ca .* or 'insecure = true'"),
        ('certificate = "c"\nkey = "k"', "certificate, key, ca go together, but only certificate and key is given"),
        (
            'insecure = true\ncertificate = "c"\nkey = "k"\nca = "a"',
            "insecure = true goes without certificate, key, ca",
        ),
        ('insecure = true\nserver_name = "x"', "insecure = true goes without server_name"),
    ],
)
def test_sentences_of_site_toml(tmp_path: Path, lines: str, sentence: str) -> None:
    path = tmp_path / "site.toml"
    path.write_text(f'name = "a"\ncoordinator = "127.0.0.1:9"\n{lines}\n')
    with pytest.raises(ConfigurationError, match=sentence):
        GrpcCommunicator(Site.read(path))


def test_files_are_beside_site_toml(
    served: Served, made: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made.a, tmp_path / "here" / "keys")
    path = tmp_path / "here" / "site.toml"
    path.write_text(
        f'name = "a"\ncoordinator = "{served.server.address}"\ncertificate = "keys/certificate.pem"\n'
        f'key = "keys/key.pem"\nca = "{made.authority.folder / "ca.pem"}"\n'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("nnUNet_fed_site", "here/site.toml")
    seat = GrpcCommunicator(Site.from_environment())
    assert seat.join("planning").name == "study"
    seat.close()


# --------------------------------------------------------------------------------------------------------- the commands


def nnunet_fed(*arguments: str | Path) -> str:
    """What a command prints, in this process; raises what it ends with."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False).stdout


def options(folder: Path) -> list[str]:
    files = files_in(folder)
    return ["--cert", str(files.certificate), "--key", str(files.key), "--ca", str(files.ca)]


def test_a_coordinator_process_and_who_watches_it(made: Study, tmp_path: Path) -> None:
    (tmp_path / "f.toml").write_text('name = "s"\nsites = ["a", "b"]\nrounds = 2\n[method]\nname = "fedavg"\n')
    serve = ["coordinator", tmp_path / "f.toml", "--listen", "127.0.0.1:0", "--state", tmp_path / "state"]
    with pytest.raises(ConfigurationError, match="--cert, --key and --ca go together: give all three"):
        nnunet_fed(*serve, *options(made.coordinator)[:4])
    command = [sys.executable, "-m", "nnunet_fed", *map(str, serve), *options(made.coordinator)]
    process = subprocess.Popen(
        [*command, "--revoked", str(made.revoked)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        status = ["status", "--coordinator", address, "--json"]
        for folder in (made.coordinator, made.watcher, made.b):
            assert json.loads(nnunet_fed(*status, *options(folder)))["study"]["name"] == "s"
        with pytest.raises(RefusedError, match="'outsider' is not a site of the study 's'"):
            nnunet_fed(*status, *options(made.outsider))
        with pytest.raises(ConfigurationError, match="--coordinator, --cert, --key and --ca go together"):
            nnunet_fed("status", *options(made.b))
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
