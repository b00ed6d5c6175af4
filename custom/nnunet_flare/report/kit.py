"""``nnunet-flare doctor --kit``: is this start-up kit sound, is its policy in force, is the server there?

Reads only, and writes nothing. That FLARE does not run yet is no failure.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
from nvflare.fuel.sec.authz import parse_policy_config

from nnunet_flare.errors import ConfigError, NNUNetFlareError, PolicyError
from nnunet_flare.nnunet.site import SiteSettings
from nnunet_flare.provision.kit import HOSPITAL, SERVER, USER, StartupKit, read_object, subject
from nnunet_flare.provision.manifest import SITE, PolicyManifest
from nnunet_flare.provision.policy import SitePolicy, policy_files
from nnunet_flare.report.connection import check_certificates, check_connection
from nnunet_flare.report.doctor import FAIL, OK, Check, diagnose, versions

__all__ = ["check_kit", "diagnose_kit"]

_INSTALL = "put the file back as it was installed, or run nnunet-flare policy install"
_OURS = "nnunet_flare.provision."
_LOGGING = "nvflare.app_common.logging."
_FILTERS = ("task_data_filters", "task_result_filters")
_PROCESSES = {
    SERVER: "nvflare.private.fed.app.server.server_train",
    HOSPITAL: "nvflare.private.fed.app.client.client_train",
}


def diagnose_kit(folder: Path, dataset: str | None = None) -> list[Check]:
    """All checks of a kit; for a hospital's, those of its data, disk and device too, with its own settings.

    Raises:
        ConfigError: the folder holds no kit.
    """
    kit = StartupKit.read(folder)
    checks = list(check_kit(kit))
    if kit.kind != HOSPITAL:
        return [*checks, *versions()]
    try:
        settings = SiteSettings.load(kit.name, kit.folder / "local")
    except NNUNetFlareError as error:
        return [*checks, _failure("site settings", error)]
    return [*checks, *diagnose(replace(settings, dataset=dataset) if dataset else settings)]


def check_kit(kit: StartupKit) -> Iterator[Check]:
    """The checks of what lies in the kit, and of the way to its server."""
    ports = " and ".join(map(str, kit.ports))
    yield Check(name="kit", status=OK, seen=f"of the {kit.kind} {kit.name}, for the server {kit.host}, port {ports}")
    yield from check_certificates(kit)
    yield from check_connection(kit)
    for name, look in _LOOKS[kit.kind].items():
        try:
            sound, seen = look(kit)
        except PolicyError as error:
            yield _failure(name, error)
        except ConfigError as error:
            yield replace(_failure(name, error), remedy=_INSTALL)
        except (AttributeError, LookupError, TypeError) as error:
            yield Check(name=name, status=FAIL, seen=f"not as FLARE reads it: {error!r}", remedy=_INSTALL)
        else:
            yield Check(name=name, status=OK if sound else FAIL, seen=seen, remedy="" if sound else _INSTALL)
    if kit.kind != USER:
        yield _process(kit)


def _security(kit: StartupKit) -> tuple[bool, str]:
    return kit.security == "mtls", f"connection_security {kit.security}"


def _manifest(kit: StartupKit) -> tuple[bool, str]:
    manifest = PolicyManifest.check(kit.folder)
    note = ": made or changed here, after provisioning" if manifest.signer == SITE else ""
    return True, f"{len(manifest.files)} files as signed by the {manifest.signer}{note}"


def _guard(kit: StartupKit) -> tuple[bool, str]:
    """The parts of the policy that are code: whatever of them a fresh installation would write must be there."""
    resources = kit.local("resources.json")
    wanted = policy_files(SitePolicy(server=kit.kind == SERVER), resources)["resources.json"]
    for part in (wanted["app_validator"], *(item for item in wanted["components"] if item["path"].startswith(_OURS))):
        if part not in (resources.get("app_validator"), *resources["components"]):
            return False, f"{part['path'].rpartition('.')[2]} is missing or altered"
    return True, "checks the policy files at every start, each job and whose requests are answered"


def _allow_list(kit: StartupKit) -> tuple[bool, str]:
    resources, wanted = kit.local("resources.json"), set(SitePolicy(server=kit.kind == SERVER).allowed_classes)
    mode, allowed = resources.get("class_list_enforcement_mode", "enforce"), set(resources["class_allow_list"])
    if mode != "enforce":
        return False, f"class_list_enforcement_mode is {mode}: nothing is refused"
    if added := sorted(allowed - wanted):
        return False, f"{len(added)} classes too many, such as {added[0]}"
    if missing := sorted(wanted - allowed):
        return False, f"lacks {', '.join(missing)}: no job can run"
    return True, f"{', '.join(sorted(name.rpartition('.')[2] for name in wanted))}; enforced"


def _foreign_code(kit: StartupKit) -> tuple[bool, str]:
    """FLARE's own reading of its file; a right to everything, ``*``, goes before the single one."""
    policy, problem = parse_policy_config(kit.local("authorization.json"), {})
    if policy is None:
        return False, f"authorization.json: {problem}"
    granted = {role: rights.get("*", rights.get("byoc", "none")) for role, rights in policy.role_rights.items()}
    roles = sorted(role for role, condition in granted.items() if str(condition).strip().lower() not in ("none", "no"))
    return not roles, f"jobs of {', '.join(roles)} may bring code (byoc)" if roles else "no role may bring code (byoc)"


def _log_streaming(kit: StartupKit) -> tuple[bool, str]:
    resources = kit.local("resources.json")
    if resources.get("allow_log_streaming", True) is not False:
        return False, "allow_log_streaming is not false: logs of jobs go to the server"
    streams = [item["id"] for item in resources["components"] if str(item.get("path")).startswith(_LOGGING)]
    return not streams, f"component {', '.join(streams)} moves logs" if streams else "off"


def _privacy_scope(kit: StartupKit) -> tuple[bool, str]:
    """A job chooses among a site's scopes; decryption goes before all other filters, encryption behind them."""
    privacy = read_object(kit.folder / "local" / "privacy.json")
    names = [scope["name"] for scope in privacy["scopes"]]
    if len(names) != 1:
        return False, f"{len(names)} scopes, of which a job may choose: {', '.join(names) or 'none'}"
    seen = f"{names[0]}, default_scope {privacy.get('default_scope')}"
    if kit.kind == HOSPITAL:
        (installed,) = policy_files(kit.policy, kit.local("resources.json"))["privacy.json"]["scopes"]
        if any(privacy["scopes"][0].get(name, []) != installed[name] for name in _FILTERS):
            return False, f"{seen}; the filters of encryption are not where a policy has them"
        seen += f"; encryption {'' if kit.policy.require_encryption else 'not '}required"
    return privacy.get("default_scope") == names[0], seen


def _storage(kit: StartupKit) -> tuple[bool, str]:
    """Jobs and snapshots; what a restart of the machine deletes must not hold them."""
    resources = kit.local("resources.json")
    manager = next(item for item in resources["components"] if item["id"] == "job_manager")
    snapshots = resources["snapshot_persistor"]["args"]["storage"]
    folders = [manager["args"]["uri_root"], snapshots["args"]["root_dir"]]
    passing = {"/tmp", tempfile.gettempdir()}
    lost = [name for name in folders if any(Path(name).is_relative_to(parent) for parent in passing)]
    return not lost, f"{', '.join(lost)}: lost at a restart" if lost else ", ".join(folders)


def _role(kit: StartupKit) -> tuple[bool, str]:
    """The role that the user's certificate names, and what our site policy gives it."""
    try:
        role = subject(kit.certificates()[0]).get("role", "none")
    except (OSError, ValueError):
        role = "unknown, without a certificate"
    rights = policy_files(SitePolicy(), {"components": []})["authorization.json"]["permissions"].get(role)
    if rights is None:
        return False, f"{role}: no site gives it any right"
    granted = sorted(right for right, condition in rights.items() if condition != "none")
    return True, f"{role}: {', '.join(granted)}"


def _process(kit: StartupKit) -> Check:
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if _PROCESSES[kit.kind] in command and str(kit.folder) in map(_resolved, command):
            return Check(name="FLARE", status=OK, seen=f"runs, process {process.pid}")
    return Check(name="FLARE", status=OK, seen="no process of this kit on this machine")


_POLICY: dict[str, Callable[[StartupKit], tuple[bool, str]]] = {
    "connection security": _security,
    "policy files": _manifest,
    "policy guard": _guard,
    "allow list": _allow_list,
    "code from outside": _foreign_code,
    "log streaming": _log_streaming,
    "privacy scope": _privacy_scope,
}
_LOOKS: dict[str, dict[str, Callable[[StartupKit], tuple[bool, str]]]] = {
    SERVER: _POLICY | {"storage": _storage},
    HOSPITAL: _POLICY,
    USER: {"connection security": _security, "role": _role},
}


def _failure(name: str, error: NNUNetFlareError) -> Check:
    seen = f"{error.field}: expected {error.expected}, found {error.found}"
    return Check(name=name, status=FAIL, seen=seen, remedy=error.remedy)


def _resolved(argument: str) -> str:
    return str(Path(argument).resolve()) if argument.startswith("/") else argument
