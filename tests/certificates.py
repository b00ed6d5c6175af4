"""Certificates such as FLARE's provisioning makes, in a moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from nnunet_flare.encryption.envelope import Identity

DAY = timedelta(days=1)


@cache
def key_of(name: str) -> rsa.RSAPrivateKey:
    """The same at each call: keys take long to make."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@dataclass(frozen=True)
class Project:
    """A CA, which certifies whomever a test names.

    Args:
        name: Of the CA.
        key: Name of its key; the same as its own, but for a forger's.
    """

    name: str = "project"
    key: str = ""
    root: x509.Certificate = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", self.certify(self.name, self._key))

    @property
    def _key(self) -> rsa.RSAPrivateKey:
        return key_of(self.key or self.name)

    def certify(
        self,
        name: str,
        key: Any = None,
        *,
        role: str | None = None,
        start: timedelta = -DAY,
        end: timedelta = 90 * DAY,
    ) -> x509.Certificate:
        subject = [x509.NameAttribute(NameOID.COMMON_NAME, name)]
        if role:
            subject.append(x509.NameAttribute(NameOID.UNSTRUCTURED_NAME, role))
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder(
            issuer_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)]),
            subject_name=x509.Name(subject),
            public_key=(key or key_of(name)).public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=now + start,
            not_valid_after=now + end,
        )
        return builder.sign(self._key, hashes.SHA256())

    def identity(
        self,
        name: str,
        *,
        role: str | None = None,
        peers: Mapping[str, str] | None = None,
        not_peers: tuple[str, ...] = (),
    ) -> Identity:
        return Identity(
            certificate=self.certify(name, role=role),
            private_key=key_of(name),
            root=self.root,
            peers=peers or {},
            not_peers=not_peers,
        )
