"""A start-up kit as FLARE makes it: whose it is, and which server it goes to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.x509.oid import NameOID

from nnunet_flare.errors import ConfigError
from nnunet_flare.provision.policy import SitePolicy

__all__ = ["HOSPITAL", "SERVER", "USER", "StartupKit", "read_object", "subject"]

SERVER, HOSPITAL, USER = "server", "hospital", "user"
_REMEDY = "name the folder of one participant, which holds startup and local"


@dataclass(frozen=True, kw_only=True)
class StartupKit:
    """One participant's kit.

    Args:
        folder: Holds ``startup`` and ``local``.
        kind: ``server``, ``hospital`` or ``user``.
        name: FLARE's name of the participant.
        host: Host name by which the kit reaches the server; for the server, its own.
        ports: The server's ports that this kit uses.
        server: Name that FLARE expects in the server's certificate.
        security: FLARE's ``connection_security``.
    """

    folder: Path
    kind: str
    name: str
    host: str
    ports: tuple[int, ...]
    server: str
    security: str

    @classmethod
    def read(cls, folder: Path) -> StartupKit:
        """The kit in ``folder``.

        Raises:
            ConfigError: FLARE's start file is missing, or not as this version of FLARE writes it.
        """
        for name, read in _READERS.items():
            if (file := folder / "startup" / name).is_file():
                try:
                    return cls(folder=folder.resolve(), **read(read_object(file)))
                except (KeyError, IndexError, TypeError, ValueError) as error:
                    raise ConfigError(
                        field=f"startup/{name}",
                        expected="what FLARE writes at provisioning",
                        found=f"{type(error).__name__}: {error}",
                        remedy="provision with the supported version of FLARE",
                    ) from error
        raise ConfigError(
            field="start-up kit",
            expected=f"one of {', '.join(_READERS)} in its startup folder",
            found="none of them",
            remedy=_REMEDY,
            local_detail=str(folder),
        )

    @classmethod
    def read_site(cls, folder: Path) -> StartupKit:
        """The kit of a hospital or of the server, which have policies.

        Raises:
            ConfigError: as ``read`` does, and for a user's kit.
        """
        return cls.read(folder)._demand({HOSPITAL, SERVER}, "policies belong to sites: name a site's kit")

    @classmethod
    def read_user(cls, folder: Path) -> StartupKit:
        """The kit of a person, who asks the server for something.

        Raises:
            ConfigError: as ``read`` does, and for a site's kit.
        """
        return cls.read(folder)._demand({USER}, "name the kit that provisioning made for you, such as lead@example.org")

    def _demand(self, kinds: set[str], remedy: str) -> StartupKit:
        if self.kind not in kinds:
            raise ConfigError(
                field="start-up kit",
                expected=f"the kit of a {' or '.join(sorted(kinds))}",
                found=f"that of the {self.kind} {self.name}",
                remedy=remedy,
            )
        return self

    @property
    def policy(self) -> SitePolicy:
        """What this package writes into the kit of a site, as the policy that it has already says.

        Raises:
            ConfigError: its ``privacy.json`` is not one that this package writes.
        """
        scopes: Any = [{}]
        if (file := self.folder / "local" / "privacy.json").exists():
            scopes = read_object(file).get("scopes")
            if not isinstance(scopes, list) or len(scopes) != 1:
                raise ConfigError(
                    field="local/privacy.json",
                    expected="one scope",
                    found=f"{len(scopes)} scopes" if isinstance(scopes, list) else "none",
                    remedy="put the file back as it was installed, or remove it to install a policy without filters",
                )
        return SitePolicy.of_scope(scopes[0], server=self.kind == SERVER)

    def certificates(self) -> tuple[x509.Certificate, x509.Certificate]:
        """The participant's own, and the CA's.

        Raises:
            OSError: one cannot be read.
            ValueError: one is no certificate.
        """
        files = (self.certificate_file, self.root_file)
        own, root = (x509.load_pem_x509_certificate(file.read_bytes()) for file in files)
        return own, root

    @property
    def certificate_file(self) -> Path:
        return self.folder / "startup" / f"{self._base}.crt"

    @property
    def key_file(self) -> Path:
        return self.folder / "startup" / f"{self._base}.key"

    @property
    def root_file(self) -> Path:
        return self.folder / "startup" / "rootCA.pem"

    @property
    def _base(self) -> str:
        return "server" if self.kind == SERVER else "client"

    def local(self, name: str) -> dict[str, Any]:
        """The content of a file in ``local`` that FLARE reads; its ``.default`` where there is no other.

        Raises:
            ConfigError: neither is there, or it is no JSON object.
        """
        file = self.folder / "local" / name
        return read_object(file if file.exists() else file.with_name(f"{name}.default"))


def subject(certificate: x509.Certificate) -> dict[str, str]:
    """What FLARE writes into a certificate: ``name``, ``org`` and, for users, ``role``."""
    fields = {"name": NameOID.COMMON_NAME, "org": NameOID.ORGANIZATION_NAME, "role": NameOID.UNSTRUCTURED_NAME}
    values = {field: certificate.subject.get_attributes_for_oid(oid) for field, oid in fields.items()}
    return {field: str(value[0].value) for field, value in values.items() if value}


def read_object(file: Path) -> dict[str, Any]:
    """Raises ConfigError: the file is no JSON object."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        content = error
    if not isinstance(content, dict):
        raise ConfigError(
            field=f"{file.parent.name}/{file.name}",
            expected="a JSON object",
            found="no such file" if isinstance(content, FileNotFoundError) else type(content).__name__,
            remedy="put the file back as it was installed",
        )
    return content


def _server(start: dict[str, Any]) -> dict[str, Any]:
    entry = start["servers"][0]
    host, port = _target(entry)
    return {
        "kind": SERVER,
        "name": entry["admin_server"],
        "host": host,
        "ports": tuple(dict.fromkeys((port, int(entry["admin_port"])))),
        "server": entry["admin_server"],
        "security": entry["connection_security"],
    }


def _hospital(start: dict[str, Any]) -> dict[str, Any]:
    entry, client = start["servers"][0], start["client"]
    host, port = _target(entry)
    return {
        "kind": HOSPITAL,
        "name": client["fqsn"].rpartition(".")[2],
        "host": host,
        "ports": (port,),
        "server": entry["identity"],
        "security": client["connection_security"],
    }


def _user(start: dict[str, Any]) -> dict[str, Any]:
    admin = start["admin"]
    return {
        "kind": USER,
        "name": admin["username"],
        "host": admin["host"],
        "ports": (int(admin["port"]),),
        "server": admin["server_identity"],
        "security": admin["connection_security"],
    }


def _target(entry: dict[str, Any]) -> tuple[str, int]:
    host, _, port = entry["service"]["target"].rpartition(":")
    return host, int(port)


_READERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "fed_server.json": _server,
    "fed_client.json": _hospital,
    "fed_admin.json": _user,
}
