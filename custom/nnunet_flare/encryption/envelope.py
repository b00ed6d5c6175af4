"""A key on its way from one hospital to another, through a server that cannot read it.

The key is encrypted with AES-256-GCM under a fresh key, that one with RSA-OAEP to the recipient's FLARE certificate,
and the whole is signed by the sender (RSA-PSS): who receives it knows that a hospital made the key, not the server.
"""

from __future__ import annotations

import base64
import datetime
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.x509.oid import NameOID

from nnunet_flare.errors import EncryptionError

__all__ = ["Identity", "open_envelope", "peer_certificate", "seal"]

Envelope = Mapping[str, str]
"""``wrapped``, ``nonce``, ``sealed`` and ``signature``, in base64."""

_SHA256 = hashes.SHA256()
_OAEP = padding.OAEP(mgf=padding.MGF1(_SHA256), algorithm=_SHA256, label=None)
_PSS = padding.PSS(mgf=padding.MGF1(_SHA256), salt_length=padding.PSS.DIGEST_LENGTH)
_NONCE_BYTES = 12


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A site's FLARE certificate with its private key, the CA, and whom the site accepts as a peer.

    Args:
        certificate: Of the site.
        private_key: Of the certificate.
        root: Of the project's CA.
        peers: Site -> SHA-256 fingerprint of its certificate in hexadecimal; empty accepts whomever the CA certified.
            The site itself need not be among them.
        not_peers: Names that the CA certified and that are no hospital: the server's.
    """

    certificate: x509.Certificate
    private_key: rsa.RSAPrivateKey = field(repr=False)
    root: x509.Certificate
    peers: Mapping[str, str] = field(default_factory=dict)
    not_peers: Sequence[str] = ()

    @property
    def name(self) -> str:
        return _name(self.certificate)

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()


def peer_certificate(pem: str, *, site: str, identity: Identity) -> x509.Certificate:
    """A peer's certificate that the server relayed.

    Raises:
        EncryptionError: it is not that site's, not from this project's CA, out of date, or not the pinned one.
    """
    try:
        certificate = x509.load_pem_x509_certificate(pem.encode())
        certificate.verify_directly_issued_by(identity.root)
        if not isinstance(certificate.public_key(), rsa.RSAPublicKey):
            raise ValueError("FLARE makes RSA keys")
    except (AttributeError, ValueError, TypeError, InvalidSignature) as error:
        raise _refusal("certificate", "one of the project's CA", type(error).__name__, site) from error
    if (name := _name(certificate)) != site:
        raise _refusal("certificate", f"that of {site}", f"that of {name}", site)
    role = certificate.subject.get_attributes_for_oid(NameOID.UNSTRUCTURED_NAME)  # FLARE's, of persons
    if role or site in identity.not_peers:
        raise _refusal("certificate", "that of a hospital", "that of a person" if role else "the server's", site)
    now = datetime.datetime.now(datetime.UTC)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise _refusal("certificate", "one that is valid today", "one that is out of date", site)
    if identity.peers and certificate.public_key() != identity.certificate.public_key():
        pinned, found = identity.peers.get(site), certificate.fingerprint(_SHA256).hex()
        if pinned is None:
            raise _refusal("peers", f"one of {', '.join(identity.peers)}, as this site's settings say", site, site)
        if found != pinned.replace(":", "").lower():
            raise _refusal("peers", f"fingerprint {pinned}, as this site's settings say", found, site)
    return certificate


def seal(content: bytes, *, context: Mapping[str, str], to: x509.Certificate, sender: Identity) -> dict[str, str]:
    """An envelope that only the owner of the certificate ``to`` opens.

    Args:
        content: What is sealed.
        context: What it is for; ``open_envelope`` needs the same.
        to: Checked before.
        sender: Who signs.
    """
    key, nonce = AESGCM.generate_key(256), os.urandom(_NONCE_BYTES)
    recipient = to.public_key()
    assert isinstance(recipient, rsa.RSAPublicKey), "checked by peer_certificate"
    parts = {
        "wrapped": recipient.encrypt(key, _OAEP),
        "nonce": nonce,
        "sealed": AESGCM(key).encrypt(nonce, content, _bytes(context)),
    }
    parts["signature"] = sender.private_key.sign(_signed(parts, context), _PSS, _SHA256)
    return {name: base64.b64encode(part).decode() for name, part in parts.items()}


def open_envelope(
    envelope: Envelope, *, context: Mapping[str, str], sender: x509.Certificate, recipient: Identity
) -> bytes:
    """What was sealed.

    Args:
        envelope: From ``seal``.
        context: As it was sealed for.
        sender: Whose signature it must bear; checked before.
        recipient: Who opens.

    Raises:
        EncryptionError: it is damaged, from somebody else, for somebody else, or of another context.
    """
    try:
        names = ("wrapped", "nonce", "sealed", "signature")
        parts = {name: base64.b64decode(envelope[name], validate=True) for name in names}
        signer = sender.public_key()
        assert isinstance(signer, rsa.RSAPublicKey), "checked by peer_certificate"
        signer.verify(parts["signature"], _signed(parts, context), _PSS, _SHA256)
        key = recipient.private_key.decrypt(parts["wrapped"], _OAEP)
        return AESGCM(key).decrypt(parts["nonce"], parts["sealed"], _bytes(context))
    except (KeyError, TypeError, ValueError, InvalidSignature, InvalidTag) as error:
        found = f"another, or a damaged one ({type(error).__name__})"
        raise _refusal("envelope of the key", "one that the key holder sealed for this site and run", found) from error


def _signed(parts: Mapping[str, bytes], context: Mapping[str, str]) -> bytes:
    return _bytes(context) + b"".join(parts[name] for name in ("wrapped", "nonce", "sealed"))


def _bytes(context: Mapping[str, str]) -> bytes:
    return json.dumps(dict(context), sort_keys=True).encode() + b"\n"


def _name(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def _refusal(name: str, expected: str, found: str, site: str = "") -> EncryptionError:
    remedy = (
        "compare certificates with the hospital itself, not through the server, and correct the kit or the settings"
    )
    return EncryptionError(field=name, expected=expected, found=found, remedy=remedy, site=site)
