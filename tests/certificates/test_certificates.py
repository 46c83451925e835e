"""Certificates and keys: made by our commands or by openssl's, and what is said of files that will not do."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from serving import Served, make_study
from typer.testing import CliRunner

from nnunet_fed.certificates import authority as authority_module
from nnunet_fed.certificates.authority import Authority, make_request
from nnunet_fed.certificates.deny_list import DenyList
from nnunet_fed.cli.certs_command import app
from nnunet_fed.errors import ConfigurationError, RefusedError
from nnunet_fed.transport.channel.tls import KeyFiles

SECURITY = Path(__file__).parents[2] / "docs" / "security.md"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "authority", "Study")


def files_in(folder: Path) -> KeyFiles:
    return KeyFiles(*(folder / name for name in ("certificate.pem", "key.pem", "ca.pem")))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def certs(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


# -------------------------------------------------------------------------------------------------------- the authority


def test_private_files_are_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = Authority.create(tmp_path / "authority", "Study")
        site = made.site("a")
        made.site("a", renew=True)
        make_request("b", tmp_path / "b")
    finally:
        os.umask(before)
    assert mode(made.folder) == 0o700
    assert [mode(path) for path in (made.folder / "ca.key", site / "key.pem", tmp_path / "b" / "key.pem")] == [
        0o600
    ] * 3


def test_a_site_calls_and_with_hosts_is_called(authority: Authority) -> None:
    site = files_in(authority.site("a")).read().owner
    assert (site.name, site.hosts, site.calls, site.serves, site.is_authority) == ("a", (), True, False, False)
    assert 395 < site.days_left <= 396
    serving = files_in(authority.site("coordinator", ["example.org", "::1"])).read().owner
    assert (serving.hosts, serving.calls, serving.serves) == (("example.org", "::1"), True, True)


def test_nothing_is_overwritten_unless_renewed(authority: Authority, tmp_path: Path) -> None:
    folder = authority.site("coordinator", ["example.org"])
    first = files_in(folder).read()
    with pytest.raises(ConfigurationError, match="'coordinator' has a certificate, valid until.*--renew"):
        authority.site("coordinator", ["example.org"])
    request, _ = make_request("coordinator", tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError, match="has a certificate"):  # who asks later for a name does not get it
        authority.sign(request, "coordinator", ["example.org"])
    with pytest.raises(ConfigurationError, match="holds a certificate authority already"):
        Authority.create(authority.folder, "Study")
    with pytest.raises(ConfigurationError, match="is there already.*--renew"):
        make_request("coordinator", tmp_path / "elsewhere")
    assert files_in(folder).read() == first
    authority.site("coordinator", renew=True)
    second = files_in(folder).read()
    assert second.owner.hosts == first.owner.hosts, "the hosts of before"
    assert second.owner.serial != first.owner.serial
    assert second.key != first.key
    assert {certificate.serial for certificate in authority.issued("coordinator")} == {
        first.owner.serial,
        second.owner.serial,
    }


def test_a_key_need_not_leave_its_site(authority: Authority, tmp_path: Path) -> None:
    request, public_key = make_request("a", tmp_path / "a")
    with pytest.raises(ConfigurationError, match="asks for a certificate for 'a', --name says 'b'"):
        authority.sign(request, "b")
    folder = authority.sign(request, "a")
    assert not (folder / "key.pem").exists()
    for name in ("certificate.pem", "ca.pem"):
        shutil.copy(folder / name, tmp_path / "a")
    assert files_in(tmp_path / "a").read().owner.public_key == public_key
    assert make_request("a", tmp_path / "a", renew=True)[1] == public_key
    assert authority.sign(request, "a", renew=True) == folder


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["-newkey", "rsa:1024", "-nodes"], "has a key that is not accepted.*P-256"),
        (["-newkey", "ed25519", "-nodes"], "has a key that is not accepted.*P-256"),
        (["-newkey", "rsa:2048", "-nodes", "-subj", "/CN=a/CN=b"], "for 'a' and 'b', --name says 'a'"),
    ],
)
def test_requests_that_are_not_signed(authority: Authority, tmp_path: Path, command: list[str], expected: str) -> None:
    openssl("req", "-new", "-subj", "/CN=a", *command, "-keyout", tmp_path / "key", "-out", tmp_path / "request")
    with pytest.raises(ConfigurationError, match=expected):
        authority.sign(tmp_path / "request", "a")
    assert authority.issued() == []


def test_a_request_that_was_changed_is_not_signed(authority: Authority, tmp_path: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    request, _ = make_request("aaaa", tmp_path / "a")
    der = x509.load_pem_x509_csr(request.read_bytes()).public_bytes(Encoding.DER)
    assert der.count(b"aaaa") == 1
    changed = x509.load_der_x509_csr(der.replace(b"aaaa", b"bbbb"))
    request.write_bytes(changed.public_bytes(Encoding.PEM))
    with pytest.raises(ConfigurationError, match="signature does not match"):
        authority.sign(request, "bbbb")
    request.write_text("nonsense")
    with pytest.raises(ConfigurationError, match="no request"):
        authority.sign(request, "bbbb")


@pytest.mark.parametrize("host", ["example.org:7464", "a b", "", "-x", "*", "a..b", "http://x", "ä.org", "x" * 64])
def test_hosts_that_are_none(authority: Authority, host: str) -> None:
    with pytest.raises(ConfigurationError, match="--host .* is neither a host's name nor an address"):
        authority.site("coordinator", [host])
    assert not list((authority.folder / "sites").iterdir())
    assert authority.issued() == []


def test_what_cannot_be_made(authority: Authority, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="The name 'a/b'"):
        authority.site("a/b")
    with pytest.raises(ConfigurationError, match="'a' has no certificate to renew"):
        authority.site("a", renew=True)
    with pytest.raises(ConfigurationError, match="reach the coordinator: --host"):
        authority.site("coordinator")
    with pytest.raises(ConfigurationError, match="1 to 64 letters"):
        Authority.create(tmp_path / "other", "x" * 65)
    with pytest.raises(ConfigurationError, match="holds no certificate authority.*certs init"):
        Authority(tmp_path)


def test_no_certificate_outlives_its_authority(tmp_path: Path) -> None:
    made = Authority.create(tmp_path / "authority", "Study", days=5)
    assert files_in(made.site("a")).read().owner.ends == made.certificate.ends


# --------------------------------------------------------------------------------------------------------- the commands


def test_the_commands_from_init_to_revoke(tmp_path: Path) -> None:
    folder = tmp_path / "authority"
    assert str(folder / "ca.key") in certs("init", folder, "--name", "Study")
    certs("site", folder, "coordinator", "--host", "example.org", "--host", "127.0.0.1")
    certs("site", folder, "a", "--days", "10")
    asked = certs("request", "b", "--out", tmp_path / "b")
    signed = certs("sign", folder, tmp_path / "b" / "request.csr", "--name", "b")
    assert asked.rpartition(": ")[2] == signed.rpartition(": ")[2], "the same fingerprint"
    told = certs("show", folder)
    assert re.search(r"^coordinator: .* 396 days left, serial number [0-9A-F]+, at example.org 127.0.0.1$", told, re.M)
    assert re.search(r"^a: .* 10 days left, serial number [0-9A-F]+$", told, re.M)
    serial = files_in(folder / "sites" / "a").read().owner.serial
    certs("site", folder, "a", "--renew")
    assert f"revoked: {serial} of 'a'" in certs("revoke", folder, serial.lower())
    denied = DenyList(folder / "revoked.txt")
    renewed = files_in(folder / "sites" / "a").read().owner.serial
    assert serial in denied
    assert renewed not in denied
    assert f"revoked: {renewed} of 'a'" in certs("revoke", folder, "a")
    assert "0 added" in certs("revoke", folder, "a")
    assert certs("show", folder).count(", revoked") == 2
    with pytest.raises(ConfigurationError, match="no certificate for 'nobody'"):
        certs("revoke", folder, "nobody")
    assert certs("show", folder / "sites" / "a" / "certificate.pem").startswith("a: ")
    with pytest.raises(ConfigurationError, match="holds no certificate"):
        certs("show", folder / "sites" / "a" / "key.pem")


def test_commands_without_tls_do_not_load_the_library() -> None:
    code = (
        "import sys, nnunet_fed.cli.app, nnunet_fed.transport.coordinator.server, nnunet_fed.transport.site.client\n"
        "sys.exit('imported' if 'cryptography' in sys.modules else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ----------------------------------------------------------------------------------------------------------- deny lists


@pytest.mark.parametrize(
    "line", ["0A1B", "0a1b", "serial=0A1B", "0x0a1b", "0A:1B", "A1B  # site a, 2026-01-01", "\n# x\n\nA1B\n"]
)
def test_serial_numbers_as_people_write_them(tmp_path: Path, line: str) -> None:
    (tmp_path / "revoked.txt").write_text(line)
    denied = DenyList(tmp_path / "revoked.txt")
    assert "A1B" in denied
    assert "1B" not in denied


def test_a_deny_list_is_read_again_and_a_broken_one_is_no_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "revoked.txt"
    with pytest.raises(ConfigurationError, match="cannot be read"):
        DenyList(path)
    path.write_text("")
    denied = DenyList(path)
    assert "AB" not in denied
    path.write_text("AB\n")
    assert "AB" in denied
    path.write_text("AB\nsite_a\n")
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="'site_a' in line 2: write a hexadecimal"):
            "AB" in denied  # noqa: B015
    path.unlink()
    with pytest.raises(ConfigurationError, match="cannot be read"):
        "AB" in denied  # noqa: B015
    path.write_text("CD\n")
    assert "AB" not in denied
    assert "CD" in denied


# ----------------------------------------------------------------------------------------------- files that will not do


@pytest.fixture
def site(authority: Authority) -> KeyFiles:
    return files_in(authority.site("a"))


@pytest.mark.parametrize("bits", [0o644, 0o604, 0o660, 0o666, 0o777])
def test_a_key_that_others_can_read_is_refused(site: KeyFiles, bits: int) -> None:
    site.key.chmod(bits)
    with pytest.raises(ConfigurationError, match=rf"key.pem has the mode {bits:o}: whoever can read it.*chmod 600"):
        site.read()


def test_a_key_on_a_read_only_mount_gets_a_remedy_that_can_be_followed(
    site: KeyFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.key.chmod(0o444)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_RDONLY))
    with pytest.raises(
        ConfigurationError, match=r"has the mode 444.*defaultMode: 0400.*install -m 600 .*key.pem"
    ) as told:
        site.read()
    assert "chmod" not in str(told.value)
    monkeypatch.undo()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)  # another user's file
    with pytest.raises(ConfigurationError, match="install -m 600"):
        site.read()


@pytest.mark.parametrize("bits", [0o600, 0o400, 0o640])
def test_a_key_for_its_owner_and_at_most_a_group(site: KeyFiles, bits: int) -> None:
    site.key.chmod(bits)
    site.read()


def test_a_key_of_another_certificate(authority: Authority, site: KeyFiles) -> None:
    shutil.copy(authority.site("b") / "key.pem", site.key)
    with pytest.raises(ConfigurationError, match="key.pem does not belong to the certificate .*certificate.pem"):
        site.read()


def test_a_locked_key(site: KeyFiles) -> None:
    openssl("pkey", "-in", site.key, "-aes256", "-passout", "pass:x", "-out", site.key.with_name("locked"))
    site.key.with_name("locked").replace(site.key)
    site.key.chmod(0o600)
    with pytest.raises(ConfigurationError, match="locked by a passphrase.*openssl pkey"):
        site.read()


@pytest.mark.parametrize("name", ["certificate", "key", "ca"])
def test_files_that_are_missing_or_something_else(site: KeyFiles, name: str) -> None:
    path: Path = getattr(site, name)
    path.write_bytes(b"nonsense")
    with pytest.raises(ConfigurationError, match=f"{path.name} holds no"):
        site.read()
    path.unlink()
    with pytest.raises(ConfigurationError, match=rf"{path.name} cannot be read: No such file.*nnunet_fed certs"):
        site.read()


def test_a_certificate_in_place_of_the_authoritys(site: KeyFiles) -> None:
    shutil.copy(site.certificate, site.ca)
    with pytest.raises(ConfigurationError, match="ca.pem holds no authority's certificate"):
        site.read()


def test_dates(authority: Authority, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    files_in(authority.site("soon", days=20)).read()
    assert "ends in 20 days: renew it" in caplog.text
    monkeypatch.setattr(authority_module, "CLOCK_SKEW", timedelta(days=30))
    with pytest.raises(ConfigurationError, match=r"certificate of 'late' expired on \d{4}-.* Renew it"):
        files_in(authority.site("late", days=-1)).read()
    monkeypatch.setattr(authority_module, "CLOCK_SKEW", timedelta(days=-1))
    with pytest.raises(ConfigurationError, match="which is yet to come. Is this machine's clock right"):
        files_in(authority.site("early")).read()


# ------------------------------------------------------------------------------------------------------ by the document


def openssl(*arguments: str | Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not on the PATH")
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def documented(tool: str) -> str:
    """The shell blocks of docs/security.md that begin with ``# TOOL: ...``, in their order."""
    found: list[str] = re.findall(rf"```bash\n# {tool}: [^\n]*\n(.*?)```", SECURITY.read_text(), re.DOTALL)
    return "\n".join(found)


def run(script: str, folder: Path) -> None:
    beside = Path(sys.executable).parent
    subprocess.run(
        ["bash", "-e", "-c", f'PATH="{beside}:$PATH"\n{script}'],
        cwd=folder,
        check=True,
        capture_output=True,
        timeout=60,
    )


Serve = Callable[..., Served]


SERVER = {"server_name": "coordinator.example.org"}
"""The documents' coordinator is on this machine."""


def exchange(serve: Serve, coordinator: Path, folder: Path) -> Served:
    """Serve two sites, whose files are in folders of their names, and let them exchange something."""
    served = serve(make_study(["site_a", "site_b"]), keys=files_in(coordinator), revoked=coordinator / "revoked.txt")
    seats = [served.seat(name, files=folder / name, tls=SERVER) for name in served.study.sites]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda seat: seat.gather("r/x", seat.site), seats))
    assert answers == [{"site_a": "site_a", "site_b": "site_b"}] * 2
    return served


def test_the_documents_openssl_commands(tmp_path: Path, serve: Serve) -> None:
    openssl("version")
    script = documented("openssl")
    *making, revoking = script.splitlines()
    assert revoking.startswith("openssl x509")
    again = script[script.index("umask 077\nmkdir site_a") : script.index("umask 077\nmkdir coordinator")]
    run("\n".join(making) + "\n" + again.replace("site_a", "site_b"), tmp_path)
    served = exchange(serve, tmp_path / "coordinator", tmp_path)
    run(revoking, tmp_path)
    with pytest.raises(RefusedError, match="certificate of 'site_a' .* has been revoked"):
        served.seat("site_a", files=tmp_path / "site_a", tls=SERVER)


def test_the_documents_own_commands(tmp_path: Path, serve: Serve) -> None:
    script = documented("nnunet_fed")
    again = script[script.index("nnunet_fed certs request") :]
    take = "cp authority/sites/site_a/*.pem site_a"
    run("\n".join([script, take, again.replace("site_a", "site_b"), take.replace("site_a", "site_b")]), tmp_path)
    coordinator = tmp_path / "authority" / "sites" / "coordinator"
    shutil.copy(tmp_path / "authority" / "revoked.txt", coordinator)
    exchange(serve, coordinator, tmp_path)
