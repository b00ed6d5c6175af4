"""What a site allows, as the files of its FLARE kit that say so.

FLARE reads a kit's ``local/resources.json`` instead of ``resources.json.default``, ``privacy.json`` for the filters
that every payload passes, and ``authorization.json`` for who may do what. ``policy_files`` is the one source of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from nnunet_flare.errors import ConfigError

__all__ = ["CLIENT_CLASSES", "READER_ROLES", "SERVER_CLASSES", "SitePolicy", "policy_files"]

DECRYPT_FILTER = "nnunet_flare.flare.filters.BFVDecryptFilter"
ENCRYPT_FILTER = "nnunet_flare.flare.filters.BFVEncryptFilter"
_ENCRYPTION = (DECRYPT_FILTER, ENCRYPT_FILTER)
CLIENT_CLASSES = ("nnunet_flare.flare.executor.NNUNetExecutor", *_ENCRYPTION)
SERVER_CLASSES = (
    "nnunet_flare.flare.asym.AsymFedAvgController",
    "nnunet_flare.flare.ffe.FFEController",
    "nvflare.app_opt.tracking.tb.tb_receiver.TBAnalyticsReceiver",
)
"""What jobs may name: the classes of our exported jobs and nothing else, no package as a whole."""

READER_ROLES = ("auditor", "member")
"""They see and change nothing. ``nvflare cert`` knows only the second."""

SERVER_STORAGE = "storage"
_GUARD = {"id": "policy_guard", "path": "nnunet_flare.provision.guard.PolicyGuard"}
_GATE = {"id": "request_gate", "path": "nnunet_flare.provision.requests.RequestGate"}
_VALIDATOR = "nnunet_flare.provision.application.ApplicationValidator"
_REPLACED = ("policy_guard", "request_gate", "site_log_streamer", "log_receiver")
_NO_CODE = {"byoc": "none", "server-predeployed-flwr": "none"}
_READ = {"view": "any"}


@dataclass(frozen=True, kw_only=True)
class SitePolicy:
    """What one participant allows.

    Args:
        server: True for the server, False for a hospital.
        task_data_filters: FLARE filter configurations (``path``, ``args``, ``direction``) that every task's data
            passes here, before any filter that a job brings.
        task_result_filters: The same for every result.
        require_encryption: Let nothing in clear text leave, and refuse jobs without encryption: a hospital's result is
            encrypted behind all other filters, as the last thing that happens to it.

    Raises:
        ConfigError: a server shall require encryption.
    """

    server: bool = False
    task_data_filters: Sequence[Mapping[str, Any]] = ()
    task_result_filters: Sequence[Mapping[str, Any]] = ()
    require_encryption: bool = False

    def __post_init__(self) -> None:
        if self.server and self.require_encryption:
            raise ConfigError(
                field="require_encryption",
                expected="a hospital's policy",
                found="the server's, which sees ciphertexts and opens none",
                remedy="require encryption in the hospitals' kits",
            )

    @classmethod
    def of_scope(cls, scope: Mapping[str, Any], *, server: bool) -> SitePolicy:
        """What a privacy scope of ``policy_files`` was made from; one filter of encryption alone requires it too."""
        data, result = (scope.get(name) or () for name in ("task_data_filters", "task_result_filters"))
        others = [[item for item in items if item.get("path") not in _ENCRYPTION] for items in (data, result)]
        required = len(others[0]) < len(data) or len(others[1]) < len(result)
        return cls(
            server=server, task_data_filters=others[0], task_result_filters=others[1], require_encryption=required
        )

    @property
    def allowed_classes(self) -> tuple[str, ...]:
        return SERVER_CLASSES if self.server else CLIENT_CLASSES


def policy_files(policy: SitePolicy, default_resources: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The files of a kit's ``local`` folder that put a policy into force.

    Args:
        policy: What the participant allows.
        default_resources: Content of the ``resources.json.default`` that FLARE wrote for this participant.

    Returns:
        File name -> JSON content.

    Raises:
        ConfigError: ``default_resources`` is not what this version of FLARE writes.
    """
    return {
        "resources.json": _resources(policy, default_resources),
        "privacy.json": _privacy(policy),
        "authorization.json": _authorization(),
    }


def _resources(policy: SitePolicy, default: Mapping[str, Any]) -> dict[str, Any]:
    resources = deepcopy(dict(default))
    try:
        components = {component["id"]: component for component in resources["components"]}
        for name in _REPLACED:
            components.pop(name, None)
        if policy.server:
            components["job_manager"]["args"]["uri_root"] = f"{SERVER_STORAGE}/jobs"
            components["job_store"] = {"id": "job_store", "path": "nnunet_flare.provision.storage.KitStorage"}
            resources["snapshot_persistor"]["args"]["storage"] = {
                "path": "nnunet_flare.provision.storage.KitStorage",
                "args": {"root_dir": f"{SERVER_STORAGE}/snapshots"},
            }
    except (KeyError, TypeError) as error:
        raise ConfigError(
            field="resources.json.default",
            expected="the resources of a server" if policy.server else "the resources of a client",
            found=f"no {error}" if isinstance(error, KeyError) else "another structure",
            remedy="provision with the supported version of FLARE",
        ) from error
    return resources | {
        "class_list_enforcement_mode": "enforce",
        "class_allow_list": list(policy.allowed_classes),
        "app_validator": {"path": _VALIDATOR, "args": {"server": policy.server}},
        "allow_log_streaming": False,
        "components": [_GUARD, *([] if policy.server else [_GATE]), *components.values()],
    }


def _privacy(policy: SitePolicy) -> dict[str, Any]:
    """One scope: a job chooses among a site's scopes, so a second one would be a way round the first."""
    decrypt, encrypt = ([{"path": path, "args": {}}] if policy.require_encryption else [] for path in _ENCRYPTION)
    scope = {
        "name": "nnunet_flare",
        "properties": {},
        "task_data_filters": [*decrypt, *map(dict, policy.task_data_filters)],
        "task_result_filters": [*map(dict, policy.task_result_filters), *encrypt],
    }
    return {"scopes": [scope], "default_scope": "nnunet_flare"}


def _authorization() -> dict[str, Any]:
    """FLARE's roles, none of which may bring code or run shell commands.

    What a role does not name, it may not do. A lead operates nothing: whoever provisions may well be of the server's
    own organisation.
    """
    own_jobs = {"clone_job": "n:submitter", "manage_job": "n:submitter", "download_job": "n:submitter"}
    permissions: dict[str, Any] = {
        "project_admin": {
            "submit_job": "any",
            "clone_job": "any",
            "manage_job": "any",
            "download_job": "any",
            "operate": "any",
            **_READ,
            **_NO_CODE,
        },
        "org_admin": {
            "manage_job": "o:submitter",
            "download_job": "o:submitter",
            "operate": "o:site",
            **_READ,
            **_NO_CODE,
        },
        "lead": {"submit_job": "any", **own_jobs, **_READ, **_NO_CODE},
    }
    return {"format_version": "1.0", "permissions": permissions | {role: dict(_READ) for role in READER_ROLES}}
