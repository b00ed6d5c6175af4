"""The project's CA in the form that ``nvflare cert approve`` reads, from the state of ``nvflare provision``.

With it a hospital that makes its own key joins a project whose other kits were made centrally.
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from nnunet_flare.errors import ConfigError
from nnunet_flare.storage import read_json, write_json

__all__ = ["export_ca"]

STATE_FILE = "cert.json"


def export_ca(state: Path, out: Path) -> str:
    """Write ``rootCA.pem``, ``rootCA.key`` (its owner's only) and ``ca.json``.

    Args:
        state: Folder ``state`` of the project's provisioning workspace.
        out: Folder to make.

    Returns:
        The certificate's SHA-256 fingerprint, which a hospital compares by telephone.

    Raises:
        ConfigError: ``state`` is not such a folder, or ``out`` holds something already.
    """
    if not (state / STATE_FILE).is_file():
        raise _error("the state folder of a project", f"no {STATE_FILE}", "give <workspace>/<project>/state")
    content = read_json(state / STATE_FILE)
    if out.exists() and any(out.iterdir()):
        raise _error("a folder to make", f"{out.name}, which is not empty", "name another folder")
    certificate = x509.load_pem_x509_certificate(content["root_cert"].encode())
    out.mkdir(parents=True, mode=0o700, exist_ok=True)
    (out / "rootCA.pem").write_text(content["root_cert"])
    with os.fdopen(os.open(out / "rootCA.key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as key:
        key.write(content["root_pri_key"])
    (name,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    write_json(out / "ca.json", {"project": name.value, "provision_version": "00"})
    return certificate.fingerprint(hashes.SHA256()).hex(":").upper()


def _error(expected: str, found: str, remedy: str) -> ConfigError:
    return ConfigError(field="project CA", expected=expected, found=found, remedy=remedy)
