"""Refuses to start a site whose policy files are not those that were installed."""

from __future__ import annotations

from pathlib import Path

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.fl_exception import UnsafeComponentError

from nnunet_flare.provision.manifest import PolicyManifest

__all__ = ["PolicyGuard"]


class PolicyGuard(FLComponent):
    """Checks the kit's manifest when the site starts; FLARE ends on its error. The executor does again in every job."""

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.SYSTEM_BOOTSTRAP:
            workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
            try:
                manifest = PolicyManifest.check(Path(workspace.get_root_dir()))
            except Exception as error:  # FLARE logs any other kind, and starts
                self.log_error(fl_ctx, str(error), fire_event=False)
                raise UnsafeComponentError(str(error)) from error
            self.log_info(fl_ctx, f"site policy: {len(manifest.files)} files as signed by the {manifest.signer}")
