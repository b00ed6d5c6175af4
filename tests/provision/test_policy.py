from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FilterKey, FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.fl_exception import UnsafeComponentError
from nvflare.apis.workspace import Workspace
from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST
from nvflare.fuel.sec.authz import AuthzContext, Person
from nvflare.private.fed.app.fl_conf import create_privacy_manager
from nvflare.security.security import FLAuthorizer

from nnunet_flare.cli import main
from nnunet_flare.errors import ConfigError
from nnunet_flare.flare.filters import BFVDecryptFilter, BFVEncryptFilter
from nnunet_flare.provision.builder import install_policy
from nnunet_flare.provision.guard import PolicyGuard
from nnunet_flare.provision.kit import StartupKit
from nnunet_flare.provision.manifest import PolicyManifest
from nnunet_flare.provision.policy import READER_ROLES, SitePolicy, policy_files
from nnunet_flare.provision.requests import RequestGate
from nnunet_flare.recipe import JOBS

LIKE_FLARES = {
    "class_list_enforcement_mode": "warn",
    "class_allow_list": list(DEFAULT_CLASS_ALLOW_LIST),
    "allow_log_streaming": True,
    "client": {"retry_timeout": 30},
    "components": [
        {"id": "resource_manager", "path": "x.GPUResourceManager", "args": {}},
        {"id": "site_log_streamer", "path": "nvflare.app_common.logging.site_log_streamer.SiteLogStreamer", "args": {}},
    ],
}
"""A client's resources as FLARE would have them at its most generous."""
IN, OUT = {"path": "a.In", "args": {}}, {"path": "a.Out", "args": {"sigma": 1}, "direction": "out"}
DECRYPT = {"path": "nnunet_flare.flare.filters.BFVDecryptFilter", "args": {}}
ENCRYPT = {"path": "nnunet_flare.flare.filters.BFVEncryptFilter", "args": {}}


@pytest.fixture(scope="module")
def provisioned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> kit, with our policy installed."""
    from local_federation import LocalFederation

    federation = LocalFederation(tmp_path_factory.mktemp("provisioned"))
    federation.provision()
    return federation.kits


def local(kit: Path, name: str) -> dict[str, Any]:
    return json.loads((kit / "local" / name).read_text())


def class_paths(content: Any) -> Iterator[str]:
    """What a job names: the value of every ``path`` key, however deep."""
    if isinstance(content, dict):
        if isinstance(content.get("path"), str):
            yield content["path"]
        for value in content.values():
            yield from class_paths(value)
    elif isinstance(content, list):
        for value in content:
            yield from class_paths(value)


@pytest.mark.parametrize(("side", "server"), [("client", False), ("server", True)])
def test_the_allow_list_is_what_the_exported_jobs_name(tmp_path, side, server):
    for recipe in JOBS.values():
        recipe().export(str(tmp_path))
    configs = list(tmp_path.rglob(f"config_fed_{side}.json"))
    assert len(configs) == len(JOBS)
    named = {path for config in configs for path in class_paths(json.loads(config.read_text()))}
    assert named == set(SitePolicy(server=server).allowed_classes)


@pytest.mark.parametrize("name", ["localhost", "hospital-a"])
def test_every_allowed_path_is_a_class_and_no_package(provisioned, name):
    for path in local(provisioned[name], "resources.json")["class_allow_list"]:
        module, _, attribute = path.rpartition(".")
        assert isinstance(getattr(importlib.import_module(module), attribute), type)


def test_nothing_of_flares_own_list_is_left():
    resources = policy_files(SitePolicy(), LIKE_FLARES)["resources.json"]
    assert resources["class_allow_list"] == [
        "nnunet_flare.flare.executor.NNUNetExecutor",
        "nnunet_flare.flare.filters.BFVDecryptFilter",
        "nnunet_flare.flare.filters.BFVEncryptFilter",
    ]
    assert resources["class_list_enforcement_mode"] == "enforce"
    assert resources["allow_log_streaming"] is False
    assert [item["id"] for item in resources["components"]] == ["policy_guard", "request_gate", "resource_manager"]
    assert resources["client"] == LIKE_FLARES["client"]


@pytest.mark.parametrize("name", ["localhost", "hospital-a"])
def test_flare_finds_the_same_where_the_policy_file_is_missing(provisioned, name):
    for file in ("resources.json", "authorization.json"):
        assert local(provisioned[name], f"{file}.default") == local(provisioned[name], file)


def test_the_defaults_of_flare_are_not_changed_in_place():
    before = json.dumps(LIKE_FLARES)
    policy_files(SitePolicy(), LIKE_FLARES)
    assert json.dumps(LIKE_FLARES) == before


@pytest.mark.parametrize("resources", [{}, {"components": [{"no": "id"}]}, {"components": 1}])
def test_resources_of_another_flare_are_refused(resources):
    with pytest.raises(ConfigError, match="supported version"):
        policy_files(SitePolicy(), resources)


def test_a_client_s_resources_are_no_server_s():
    with pytest.raises(ConfigError, match="resources of a server"):
        policy_files(SitePolicy(server=True), LIKE_FLARES)


def test_the_sites_filters_are_in_its_only_scope():
    policy = SitePolicy(task_data_filters=[IN], task_result_filters=[OUT])
    privacy = policy_files(policy, LIKE_FLARES)["privacy.json"]
    (scope,) = privacy["scopes"]
    assert privacy["default_scope"] == scope["name"]
    assert (scope["task_data_filters"], scope["task_result_filters"]) == ([IN], [OUT])


def test_a_site_that_requires_encryption_decrypts_first_and_encrypts_last():
    policy = SitePolicy(task_data_filters=[IN], task_result_filters=[OUT], require_encryption=True)
    (scope,) = policy_files(policy, LIKE_FLARES)["privacy.json"]["scopes"]
    assert scope["task_data_filters"] == [DECRYPT, IN]
    assert scope["task_result_filters"] == [OUT, ENCRYPT]


def test_flare_builds_the_filters_of_encryption_from_the_kit_in_the_direction_that_they_work_in(provisioned, tmp_path):
    kit = shutil.copytree(provisioned["hospital-a"], tmp_path / "hospital-a")
    install_policy(kit, replace(StartupKit.read(kit).policy, require_encryption=True))
    manager = create_privacy_manager(Workspace(str(kit), kit.name), names_only=False)
    scope = manager.get_scope(None)
    kinds = [
        [type(item) for item in filters[direction]]
        for filters in (scope.task_data_filters, scope.task_result_filters)
        for direction in (FilterKey.IN, FilterKey.OUT)
    ]
    assert kinds == [[BFVDecryptFilter], [], [], [BFVEncryptFilter]]


def test_the_server_cannot_require_encryption(provisioned):
    with pytest.raises(ConfigError, match="require_encryption: expected a hospital's policy"):
        SitePolicy(server=True, require_encryption=True)


@pytest.mark.parametrize("required", [False, True])
def test_a_kit_s_policy_is_what_was_installed(provisioned, tmp_path, required):
    kit = shutil.copytree(provisioned["hospital-a"], tmp_path / "hospital-a")
    policy = SitePolicy(task_data_filters=[IN], task_result_filters=[OUT], require_encryption=required)
    install_policy(kit, policy)
    found = StartupKit.read(kit).policy
    assert found == policy
    before = local(kit, "privacy.json")
    install_policy(kit, found)
    assert local(kit, "privacy.json") == before


@pytest.mark.parametrize("left", ["task_data_filters", "task_result_filters"])
def test_one_filter_of_encryption_is_read_as_both(left):
    scope = policy_files(SitePolicy(require_encryption=True), LIKE_FLARES)["privacy.json"]["scopes"][0]
    assert SitePolicy.of_scope({left: scope[left]}, server=False).require_encryption


def test_the_command_requires_encryption_and_keeps_it_until_it_is_told_otherwise(provisioned, tmp_path, capsys):
    kit = shutil.copytree(provisioned["hospital-a"], tmp_path / "hospital-a")
    for options, expected in (
        ([], False), (["--require-encryption"], True), ([], True), (["--no-require-encryption"], False),
    ):  # fmt: skip
        assert main(["policy", "install", str(kit), *options]) == 0
        assert StartupKit.read(kit).policy.require_encryption is expected
        assert (DECRYPT in local(kit, "privacy.json")["scopes"][0]["task_data_filters"]) is expected
        assert "local/privacy.json" in PolicyManifest.check(kit).files
    capsys.readouterr()
    before = local(provisioned["localhost"], "privacy.json")
    assert main(["policy", "install", str(provisioned["localhost"]), "--require-encryption"]) == 1
    assert "require encryption in the hospitals' kits" in capsys.readouterr().err
    assert local(provisioned["localhost"], "privacy.json") == before


MAY = {
    "project_admin": {
        "submit_job", "clone_job", "abort_job", "delete_job", "download_job", "list_jobs", "check_status", "restart",
        "shutdown",
    },
    "lead": {"submit_job", "list_jobs", "check_status"},
    "org_admin": {"list_jobs", "check_status"},
    "auditor": {"list_jobs", "check_status"},
    "member": {"list_jobs", "check_status"},
}  # fmt: skip
MAY_AT_HOME = {
    "lead": {"clone_job", "abort_job", "delete_job", "download_job"},
    "org_admin": {"abort_job", "delete_job", "download_job", "restart", "shutdown"},
}
ASKED = MAY["project_admin"] | {"ls", "cat", "byoc"}


@pytest.mark.parametrize("role", MAY)
@pytest.mark.parametrize("at_home", [False, True])
def test_each_role_has_its_rights_and_no_other(role, at_home):
    """Asked of FLARE's own authorizer, about a stranger's job and site, and about one's own."""
    authorizer = FLAuthorizer("theirs", policy_files(SitePolicy(), LIKE_FLARES)["authorization.json"])
    user = Person("user@ours.org", "theirs" if at_home else "ours", role)
    submitter = user if at_home else Person("other@else.org", "else", "lead")
    granted = {right for right in ASKED if authorizer.authorize(AuthzContext(right, user, submitter))[0]}
    assert granted == MAY[role] | (MAY_AT_HOME.get(role, set()) if at_home else set())


def test_a_role_without_a_name_here_has_no_right():
    authorizer = FLAuthorizer("theirs", policy_files(SitePolicy(), LIKE_FLARES)["authorization.json"])
    stranger = Person("user@ours.org", "theirs", "visitor")
    assert not [right for right in ASKED if authorizer.authorize(AuthzContext(right, stranger, stranger))[0]]


def test_readers_are_those_that_change_nothing():
    rights = policy_files(SitePolicy(), LIKE_FLARES)["authorization.json"]["permissions"]
    assert {role for role, given in rights.items() if not given.keys() - {"view", "app_command"}} == set(READER_ROLES)


@pytest.mark.parametrize("name", ["localhost", "hospital-a"])
def test_installing_again_changes_nothing_but_the_signer(provisioned, name):
    kit = provisioned[name]
    policy = SitePolicy(server=name == "localhost")
    before = PolicyManifest.check(kit).files
    install_policy(kit, policy)
    assert PolicyManifest.check(kit).files == before
    assert local(kit, "resources.json")["components"][0]["id"] == "policy_guard"


def test_the_sites_own_settings_outlive_an_installation(provisioned):
    kit = provisioned["hospital-b"]
    (kit / "local" / "nnunet_flare.json").write_text('{"device": "cpu"}')
    install_policy(kit, SitePolicy())
    assert local(kit, "nnunet_flare.json") == {"device": "cpu"}


def test_a_kit_without_flares_resources_is_refused(tmp_path):
    (tmp_path / "local").mkdir()
    with pytest.raises(ConfigError, match=r"resources\.json\.default"):
        install_policy(tmp_path, SitePolicy())


def start(kit: Path) -> None:
    context = FLContext()
    context.put(FLContextKey.WORKSPACE_OBJECT, Workspace(str(kit), kit.name), private=True, sticky=False)
    PolicyGuard().handle_event(EventType.SYSTEM_BOOTSTRAP, context)


def test_a_site_starts_with_its_policy_and_with_no_other(provisioned):
    kit = provisioned["hospital-c"]
    start(kit)
    (kit / "local" / "privacy.json").unlink()
    with pytest.raises(UnsafeComponentError, match=r"local/privacy\.json was removed"):
        start(kit)
    (kit / "local" / "privacy.json").mkdir()
    with pytest.raises(UnsafeComponentError, match="directory"):
        start(kit)


def test_a_site_whose_requests_cannot_be_gated_does_not_start():
    """FLARE goes on after any other error of a component."""
    with pytest.raises(UnsafeComponentError, match="request gate"):
        RequestGate().handle_event(EventType.SYSTEM_BOOTSTRAP, FLContext())
