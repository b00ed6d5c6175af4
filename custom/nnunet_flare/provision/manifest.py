"""Digests of the files that make up a kit's policy, signed: a change to any of them shows.

FLARE signs no files of a plain kit. ``local/policy.json`` names every such file with its SHA-256, ``local/policy.sig``
is a signature over it: with the project's CA key where the kit was made centrally, with the site's own key where the
site made or changed it. That finds damage and changes by others; whoever holds the site's key can sign anew, and
``PolicyManifest.signer`` then says so.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from nnunet_flare.errors import PolicyError
from nnunet_flare.storage import write_json

__all__ = ["MANIFEST_FILE", "PROJECT", "SITE", "PolicyManifest"]

MANIFEST_FILE = "local/policy.json"
SIGNATURE_FILE = "local/policy.sig"
PROJECT, SITE = "project", "site"
_RUNTIME = "local/study_runtime.yaml"
"""Names the image that jobs run in. A Kubernetes job does not see it; where it is missing, no container starts."""
_COVERED = (
    "startup/fed_client.json",
    "startup/fed_server.json",
    "startup/*resources.json",
    "local/*resources.json",
    "local/*resources.json.default",
    "local/privacy.json",
    "local/authorization.json",
    "local/authorization.json.default",
    "local/study_registry.json",
    "local/log_config.json*",
    "**/comm_config.json",  # FLARE looks for these two in all folders of a kit
    "**/resources.json",
    _RUNTIME,
)
_PADDING = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=padding.PSS.MAX_LENGTH)
_REMEDY = (
    "put the files back as they were installed; if the change is wanted, have this site's officer see it and "
    "run nnunet-flare policy record; in a kit that was made without them, run nnunet-flare policy install"
)


@dataclass(frozen=True, kw_only=True)
class PolicyManifest:
    """The policy files of a kit as they were installed.

    Args:
        signer: ``project`` or ``site``.
        files: Path relative to the kit -> hexadecimal SHA-256.
    """

    signer: str
    files: dict[str, str]

    @classmethod
    def write(cls, kit: Path, *, key: rsa.RSAPrivateKey | None = None) -> PolicyManifest:
        """Record the kit's policy files as they are now.

        Args:
            kit: Folder that holds ``startup`` and ``local``.
            key: The project's CA key; without it, the key of the kit signs.
        """
        manifest = cls(signer=PROJECT if key else SITE, files=_digests(kit))
        write_json(kit / MANIFEST_FILE, {"signer": manifest.signer, "files": manifest.files})
        key = key or _own_key(kit)
        signature = key.sign((kit / MANIFEST_FILE).read_bytes(), _PADDING, hashes.SHA256())
        (kit / SIGNATURE_FILE).write_bytes(base64.b64encode(signature))
        return manifest

    @classmethod
    def check(cls, kit: Path) -> PolicyManifest:
        """The manifest of a kit whose policy files are exactly those recorded.

        Raises:
            PolicyError: there is no manifest, its signature is wrong, or a file was added, removed or changed.
        """
        try:
            content, signature = (kit / MANIFEST_FILE).read_bytes(), (kit / SIGNATURE_FILE).read_bytes()
        except OSError as error:
            raise _refusal("a signed record of the policy files", f"{Path(error.filename).name} is missing") from error
        manifest = _parsed(content)
        certificate = kit / "startup" / ("rootCA.pem" if manifest.signer == PROJECT else f"{_name(kit)}.crt")
        try:
            public_key = x509.load_pem_x509_certificate(certificate.read_bytes()).public_key()
            if not isinstance(public_key, rsa.RSAPublicKey):
                raise ValueError("FLARE makes RSA keys")
            public_key.verify(base64.b64decode(signature), content, _PADDING, hashes.SHA256())
        except (OSError, ValueError, InvalidSignature) as error:
            raise _refusal(f"a record signed by the {manifest.signer}", "another signature, or none") from error
        found = _digests(kit)
        expected = {name: digest for name, digest in manifest.files.items() if name != _RUNTIME or name in found}
        changed = sorted(name for name in found.keys() | expected if found.get(name) != expected.get(name))
        if changed:
            what = [f"{name} {_change(name, manifest.files, found)}" for name in changed]
            raise _refusal("the policy files as they were installed", ", ".join(what))
        return manifest


def _digests(kit: Path) -> dict[str, str]:
    files = sorted({file for pattern in _COVERED for file in kit.glob(pattern)})
    return {file.relative_to(kit).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _parsed(content: bytes) -> PolicyManifest:
    try:
        values = json.loads(content)
        signer, files = values["signer"], dict(values["files"])
    except (KeyError, TypeError, ValueError) as error:
        raise _refusal("a record with signer and files", "something else") from error
    if signer not in (PROJECT, SITE):
        raise _refusal(f"the {PROJECT} or the {SITE} as the signer", "another")
    return PolicyManifest(signer=signer, files=files)


def _change(name: str, recorded: dict[str, str], found: dict[str, str]) -> str:
    return "was added" if name not in recorded else "was removed" if name not in found else "was changed"


def _name(kit: Path) -> str:
    """Base name of the kit's certificate and key."""
    return "server" if (kit / "startup" / "fed_server.json").exists() else "client"


def _own_key(kit: Path) -> rsa.RSAPrivateKey:
    key = serialization.load_pem_private_key((kit / "startup" / f"{_name(kit)}.key").read_bytes(), password=None)
    assert isinstance(key, rsa.RSAPrivateKey), "FLARE makes RSA keys"
    return key


def _refusal(expected: str, found: str) -> PolicyError:
    return PolicyError(field="site policy", expected=expected, found=found, remedy=_REMEDY)
