"""Refuses to start a site whose policy files are not those that were installed."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from cryptography.x509.verification import VerificationError
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.fl_exception import UnsafeComponentError
from nvflare.lighter.utils import load_crt, load_crt_chain, verify_cert_chain

from nnunet_flare.errors import PolicyError
from nnunet_flare.provision.manifest import MANIFEST_FILE, PolicyManifest

__all__ = ["PolicyGuard", "is_guarded"]


class PolicyGuard(FLComponent):
    """Checks the kit's manifest when the site starts; FLARE ends on its error. The executor does again in every job.

    Raises:
        PolicyError: the kit's certificate is out of date or of another CA; FLARE itself would wait for ever, silently.
    """

    def __init__(self) -> None:
        super().__init__()
        _check_certificate(Path("startup"))  # FLARE's processes run in the kit's folder

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.SYSTEM_BOOTSTRAP:
            workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
            try:
                manifest = PolicyManifest.check(Path(workspace.get_root_dir()))
                _check_certificate(Path(workspace.get_startup_kit_dir()))
            except Exception as error:  # FLARE logs any other kind, and starts
                self.log_error(fl_ctx, str(error), fire_event=False)
                raise UnsafeComponentError(str(error)) from error
            self.log_info(fl_ctx, f"site policy: {len(manifest.files)} files as signed by the {manifest.signer}")


def is_guarded(kit: Path) -> bool:
    """True for a kit that has, or had, a policy; FLARE's simulator and its own kits have none."""
    resources = (kit / "local").glob("resources.json*")
    return (kit / MANIFEST_FILE).exists() or any(__name__ in file.read_text() for file in resources)


def _check_certificate(startup: Path) -> None:
    now = datetime.now(UTC)
    for file in startup.glob("*.crt"):
        certificate, *intermediates = load_crt_chain(file)
        start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if not start <= now <= end:
            raise PolicyError(
                field=f"startup/{file.name}",
                expected=f"a certificate that is valid now, {now:%Y-%m-%d %H:%M} UTC",
                found=f"one from {start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC",
                remedy="have the coordinator renew it, or correct this machine's clock",
            )
        try:
            verify_cert_chain(certificate, intermediates, load_crt(startup / "rootCA.pem"))
        except VerificationError as error:
            raise PolicyError(
                field=f"startup/{file.name}",
                expected="a certificate of the CA in rootCA.pem",
                found="one of another CA",
                remedy="take both from one kit of this project",
                local_detail=str(error),
            ) from error
