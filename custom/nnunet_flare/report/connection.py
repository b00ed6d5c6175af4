"""The doctor's checks of a kit's certificates, of the way to the server, and of the clock that both depend on."""

from __future__ import annotations

import ctypes
import socket
import ssl
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization

from nnunet_flare.provision.kit import HOSPITAL, SERVER, StartupKit, subject
from nnunet_flare.report.doctor import FAIL, OK, WARN, Check

__all__ = ["check_certificates", "check_connection"]

_RENEW_BEFORE = timedelta(days=30)
_PATIENCE_S = 10.0
_IGNORE_TIME = 0x200000  # OpenSSL's X509_V_FLAG_NO_CHECK_TIME: dates are judged, and named, in rows of their own
_TIMEX_BYTES = 256  # Linux' struct timex has 208; all zero is a question
_UNSYNCHRONISED = 5  # adjtimex' TIME_ERROR
_RENEW = {
    "certificate": "have the coordinator renew it, put it into startup, and start FLARE again",
    "CA certificate": "the coordinator makes a new federation: no certificate outlives its CA",
    "server certificate": "tell the coordinator: the server needs a new one",
}


def check_certificates(kit: StartupKit) -> Iterator[Check]:
    """Does the certificate belong to its key, its holder and its CA, and may nobody else read the key?"""
    remedy = "ask the coordinator for a kit, or a certificate for this kit's key"
    try:
        certificate, root = kit.certificates()
        key = serialization.load_pem_private_key(kit.key_file.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        yield Check(name="certificate", status=FAIL, seen=f"cannot be read: {_reason(error)}", remedy=remedy)
        return
    holder = subject(certificate)
    problem = ""
    if certificate.public_key() != key.public_key():
        problem = f"{kit.certificate_file.name} does not belong to {kit.key_file.name}"
    elif not _is_issued_by(certificate, root):
        problem = f"{kit.certificate_file.name} is not signed by rootCA.pem"
    elif holder.get("name") != kit.name:
        problem = f"is that of {holder.get('name')}, the kit that of {kit.name}"
    whose = ", ".join(f"{field} {value}" for field, value in holder.items())
    seen = problem or f"{whose}; signed by the CA {subject(root).get('name')}"
    yield Check(name="certificate", status=FAIL if problem else OK, seen=seen, remedy=remedy if problem else "")
    if kit.kind == HOSPITAL:  # what another hospital writes into its settings, under peers
        yield Check(name="fingerprint", status=OK, seen=certificate.fingerprint(hashes.SHA256()).hex())
    yield _lifetime("certificate", certificate)
    yield _lifetime("CA certificate", root)
    mode = kit.key_file.stat().st_mode & 0o777
    private = not mode & 0o077
    yield Check(
        name="key file",
        status=OK if private else FAIL,
        seen=f"{kit.key_file.name}, mode {mode:03o}" + ("" if private else ": others than its owner may use it"),
        remedy="" if private else f"chmod 600 startup/{kit.key_file.name}; if others had access, ask for a new kit",
    )


def check_connection(kit: StartupKit) -> Iterator[Check]:
    """Is the server there under its name, does it prove who it is, and does it accept this kit?

    What decides is the handshake of mutual TLS, with the kit's own files; no FLARE message is sent. For the server's
    own kit it is this machine's ports that are looked at, where FLARE need not run yet.
    """
    try:
        context = _context(kit)
        certificate, root = kit.certificates()
    except (OSError, ValueError) as error:
        seen = f"not tried, for this kit's certificate cannot be used: {_reason(error)}"
        yield Check(name="server", status=WARN, seen=seen, remedy="see certificate")
        return
    starts = {"this kit's certificate": certificate, "its CA": root}
    server = None
    for port in kit.ports:
        try:
            server = _shake_hands(kit, context, port)
        except OSError as error:
            yield (_unused_port if kit.kind == SERVER else _unreached)(kit, port, error)
        else:
            yield _reached(kit, port, subject(server).get("name", ""))
    if server:
        starts["the server's certificate"] = server
        yield _lifetime("server certificate", server)
    yield _clock({name: certificate.not_valid_before_utc for name, certificate in starts.items()})


def _context(kit: StartupKit) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(kit.root_file)
    context.load_cert_chain(kit.certificate_file, kit.key_file, password="")
    context.set_alpn_protocols(["h2"])
    context.verify_flags |= _IGNORE_TIME
    return context


def _shake_hands(kit: StartupKit, context: ssl.SSLContext, port: int) -> x509.Certificate:
    """The certificate of a server that has accepted ours.

    In TLS 1.3 a server judges the client after the client's part of the handshake is over: it then either closes, or
    says the first word of HTTP/2 without being asked.

    Raises:
        OSError: no connection, no handshake (``ssl.SSLError``), or our certificate is refused
            (``ConnectionAbortedError``).
    """
    address = "localhost" if kit.kind == SERVER else kit.host
    with (
        socket.create_connection((address, port), timeout=_PATIENCE_S) as connection,
        context.wrap_socket(connection, server_hostname=kit.host) as channel,
    ):
        certificate = channel.getpeercert(binary_form=True)
        try:
            accepted = channel.recv(1)
        except (ssl.SSLError, ConnectionError):
            accepted = b""
    if not accepted:
        raise ConnectionAbortedError("it closed the connection on seeing this kit's certificate")
    assert certificate, "a verified server has shown one"
    return x509.load_der_x509_certificate(certificate)


def _reached(kit: StartupKit, port: int, name: str) -> Check:
    if name != kit.server:
        seen = f"{kit.host}:{port} is {name}, this kit is made for {kit.server}"
        return Check(name="server", status=FAIL, seen=seen, remedy="ask the coordinator for a kit of this server")
    if kit.kind == SERVER:
        return Check(name=f"port {port}", status=OK, seen="in use by this server")
    seen = f"{kit.host}:{port} proved to be {name}, and accepted this kit's certificate"
    return Check(name="server", status=OK, seen=seen)


def _unreached(kit: StartupKit, port: int, error: OSError) -> Check:
    """Say how far it came: name, port, TLS, this kit's certificate."""
    if isinstance(error, socket.gaierror):
        problem, remedy = "has no address", "check the name with the coordinator, and this machine's name service"
    elif isinstance(error, ssl.SSLCertVerificationError):
        problem = f"is not the server that this kit is made for: {error.verify_message}"
        remedy = "tell the coordinator: another server, or a proxy that opens TLS, answers there"
    elif isinstance(error, ssl.SSLError):
        problem, remedy = f"speaks no TLS: {_reason(error)}", "tell the coordinator: something else answers there"
    elif isinstance(error, ConnectionAbortedError):
        problem = f"refuses this kit: {error}"
        remedy = "see certificate and clock; if both are well, the server's clock or CA is another"
    else:
        problem = f"cannot be reached: {_reason(error)}"
        remedy = f"let this machine's firewall pass TCP to {kit.host}:{port}; ask whether the server runs"
    return Check(name="server", status=FAIL, seen=f"{kit.host}:{port} {problem}", remedy=remedy)


def _unused_port(kit: StartupKit, port: int, error: OSError) -> Check:
    if isinstance(error, ConnectionRefusedError):
        return Check(name=f"port {port}", status=OK, seen="free")
    remedy = "end what listens there, or provision with other ports"
    seen = f"in use, not by the server of this kit: {_reason(error)}"
    return Check(name=f"port {port}", status=WARN, seen=seen, remedy=remedy)


def _lifetime(name: str, certificate: x509.Certificate) -> Check:
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    left = end - datetime.now(UTC)
    status = FAIL if left < timedelta() else WARN if left < _RENEW_BEFORE else OK
    seen = f"valid {start:%Y-%m-%d} to {end:%Y-%m-%d}, " + ("ended" if status == FAIL else f"{left.days} days left")
    return Check(name=f"{name} dates", status=status, seen=seen, remedy="" if status == OK else _RENEW[name])


def _clock(starts: Mapping[str, datetime]) -> Check:
    """Nothing here tells the true time; a certificate made in the future, and the kernel's own word, tell a wrong one.

    FLARE compares no clocks: the certificates' dates are all that a wrong one breaks.
    """
    now = datetime.now(UTC)
    latest = max(starts, key=lambda name: starts[name])
    if now < starts[latest]:
        seen = f"{now:%Y-%m-%d %H:%M} UTC here, but {latest} starts at {starts[latest]:%Y-%m-%d %H:%M} UTC"
        remedy = "set this machine's clock, by a time service; if it is right, the clock of whoever signed was not"
        return Check(name="clock", status=FAIL, seen=seen, remedy=remedy)
    seen = f"{now:%Y-%m-%d %H:%M} UTC, later than the start of {', '.join(starts)}; no other clock was compared"
    if _is_left_alone():
        remedy = "run chrony or systemd-timesyncd; needless where a virtual machine's host sets the clock"
        return Check(name="clock", status=WARN, seen=f"{seen}; the kernel knows of no time service", remedy=remedy)
    return Check(name="clock", status=OK, seen=seen)


def _is_left_alone() -> bool:
    """Linux says whether a time service keeps its clock; asking needs no rights and changes nothing."""
    if sys.platform != "linux":
        return False
    return bool(ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES)) == _UNSYNCHRONISED)


def _is_issued_by(certificate: x509.Certificate, root: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(root)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__).split("\n")[0]
