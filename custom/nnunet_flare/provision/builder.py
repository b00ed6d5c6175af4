"""Our steps among the builders of ``nvflare provision`` (``provisioning/project.yml``)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from nvflare.lighter.constants import CtxKey
from nvflare.lighter.entity import Participant, Project
from nvflare.lighter.impl.cert import CertBuilder
from nvflare.lighter.spec import Builder, ProvisionContext

from nnunet_flare.nnunet.site import SETTINGS_FILE, SiteSettings
from nnunet_flare.provision.kit import read_object
from nnunet_flare.provision.manifest import PolicyManifest
from nnunet_flare.provision.policy import SitePolicy, policy_files
from nnunet_flare.storage import write_json

__all__ = ["ParticipantCertBuilder", "SitePolicyBuilder", "install_policy"]


def install_policy(kit: Path, policy: SitePolicy, *, ca_key: rsa.RSAPrivateKey | None = None) -> None:
    """Write a policy into a kit, with its signed manifest, and the template of the site's settings unless it has some.

    FLARE's ``*.default`` files are overwritten with the same: it falls back to them where the others are missing, as
    after ``nvflare deploy prepare``.

    Args:
        kit: Folder that holds ``startup`` and ``local``.
        policy: What the site allows.
        ca_key: The project's CA key; without it, the manifest is signed with the kit's own.
    """
    local = kit / "local"
    for name, content in policy_files(policy, read_object(local / "resources.json.default")).items():
        write_json(local / name, content)
        if (local / f"{name}.default").exists():
            write_json(local / f"{name}.default", content)
    if not policy.server and not (local / SETTINGS_FILE).exists():
        (local / SETTINGS_FILE).write_text(json.dumps(SiteSettings.template(), indent=2) + "\n")
    PolicyManifest.write(kit, key=ca_key)


class SitePolicyBuilder(Builder):
    """Writes policy, its signed manifest, and the template of the site's settings into every site's kit.

    Goes right behind the ``WorkspaceBuilder``: builders finish in reverse order, and this one must find all files made.

    Args:
        task_data_filters: As in ``SitePolicy``, for the hospitals.
        task_result_filters: As in ``SitePolicy``, for the hospitals.
        require_encryption: As in ``SitePolicy``, for the hospitals.
    """

    def __init__(
        self,
        task_data_filters: Sequence[Mapping[str, Any]] = (),
        task_result_filters: Sequence[Mapping[str, Any]] = (),
        require_encryption: bool = False,
    ) -> None:
        self._client_policy = SitePolicy(
            task_data_filters=task_data_filters,
            task_result_filters=task_result_filters,
            require_encryption=require_encryption,
        )

    def finalize(self, project: Project, ctx: ProvisionContext) -> None:
        for folder in (ctx.get_state_dir(), *map(ctx.get_ws_dir, project.get_all_participants())):
            Path(folder).chmod(0o700)  # private keys
        ca_key = ctx.get(CtxKey.ROOT_PRI_KEY)
        for client in project.get_clients():
            install_policy(Path(ctx.get_ws_dir(client)), self._client_policy, ca_key=ca_key)
        server = Path(ctx.get_ws_dir(project.get_server()))
        if (server / "startup" / "server.key").exists():  # nvflare package has a nameless server beside the one site
            install_policy(server, SitePolicy(server=True), ca_key=ca_key)


class ParticipantCertBuilder(CertBuilder):
    """FLARE's certificates, with a lifetime of one's own, and made anew when they are about to end.

    FLARE fixes the lifetime at 360 days and hands out the certificates of the first provisioning for ever.

    Args:
        valid_days: Lifetime of every participant's certificate, in days; never beyond the CA's.
        root_valid_days: Lifetime of the project's CA, in days.
        renew_before_days: A certificate that ends within so many days is replaced at the next provisioning.
    """

    def __init__(self, valid_days: int = 360, root_valid_days: int = 3600, renew_before_days: int = 30) -> None:
        super().__init__(root_valid_days=root_valid_days)
        self._valid, self._renew_before = timedelta(days=valid_days), timedelta(days=renew_before_days)

    def _build_write_cert_pair(self, participant: Participant, base_name: str, ctx: ProvisionContext) -> None:
        state = self.persistent_state
        if state.has_subject(participant.subject):
            certificate = x509.load_pem_x509_certificate(state.get_subject_cert(participant.subject).encode())
            if certificate.not_valid_after_utc < datetime.now(UTC) + self._renew_before:
                del state.content[participant.subject]
        super()._build_write_cert_pair(participant, base_name, ctx)

    def _generate_cert(self, *args: Any, ca: bool = False, **kwargs: Any) -> Any:
        if not ca:
            end = datetime.now(UTC) + self._valid
            kwargs["not_valid_after"] = min(end, self.root_cert.not_valid_after_utc)
        return super()._generate_cert(*args, ca=ca, **kwargs)
