"""Who a site is towards its peers: its FLARE certificate, or in the simulator a throw-away one."""

from __future__ import annotations

import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from nnunet_flare.encryption.envelope import Identity
from nnunet_flare.errors import EncryptionError
from nnunet_flare.nnunet.site import SiteSettings
from nnunet_flare.provision.kit import StartupKit
from nnunet_flare.storage import FolderLock, write_atomically

__all__ = ["kit_identity", "throw_away_identity"]

_VALID = datetime.timedelta(days=3650)
Pair = tuple[x509.Certificate, rsa.RSAPrivateKey]


def kit_identity(kit: Path, settings: SiteSettings) -> Identity:
    """The identity that a hospital's start-up kit holds.

    Raises:
        EncryptionError: the kit has no certificate with an RSA key.
        ConfigError: this is no hospital's kit.
    """
    found = StartupKit.read_site(kit)
    try:
        certificate, root = found.certificates()
        key = serialization.load_pem_private_key(found.key_file.read_bytes(), password=None)
        if not isinstance(key, rsa.RSAPrivateKey):
            raise ValueError("FLARE makes RSA keys")
    except (OSError, ValueError, TypeError) as error:
        raise EncryptionError(
            field="start-up kit",
            expected="a certificate, its RSA key and rootCA.pem, as FLARE provisions them",
            found=type(error).__name__,
            remedy="provision with certificates; a proof of concept without them cannot encrypt",
            site=settings.site,
            local_detail=str(error),
        ) from error
    return Identity(
        certificate=certificate, private_key=key, root=root, peers=dict(settings.peers), not_peers=(found.server,)
    )


def throw_away_identity(settings: SiteSettings) -> Identity:
    """A certificate that protects nothing: every simulated site can read the key of the CA that signed it."""
    common = settings.home / "simulator_ca"
    lock = FolderLock(common)
    try:
        root, root_key = _kept(common, "rootCA", lambda: _issue("simulated CA", None))
        own, key = _kept(
            settings.folder / "simulator_identity", "client", lambda: _issue(settings.site, (root, root_key))
        )
    finally:
        lock.release()
    return Identity(certificate=own, private_key=key, root=root, peers=dict(settings.peers))


def _kept(folder: Path, name: str, make) -> Pair:
    certificate_file, key_file = folder / f"{name}.crt", folder / f"{name}.key"
    if not key_file.exists():
        certificate, key = make()
        form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        for file, content in (
            (certificate_file, certificate.public_bytes(serialization.Encoding.PEM)),
            (key_file, key.private_bytes(*form)),
        ):
            write_atomically(file, lambda draft, content=content: (draft.touch(0o600), draft.write_bytes(content)))
    key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
    assert isinstance(key, rsa.RSAPrivateKey), "made here"
    return x509.load_pem_x509_certificate(certificate_file.read_bytes()), key


def _issue(name: str, issuer: Pair | None) -> Pair:
    key, now = rsa.generate_private_key(public_exponent=65537, key_size=2048), datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + _VALID)
        .sign(issuer[1] if issuer else key, hashes.SHA256())
    )
    return certificate, key
