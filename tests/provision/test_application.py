"""What a job's app may hold, wherever FLARE would look for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from nvflare.apis.fl_exception import UnsafeComponentError
from nvflare.app_common.widgets.component_path_authorizer import ComponentPathAuthorizer
from nvflare.lighter.tool_consts import NVFLARE_SIG_FILE, NVFLARE_SUBMITTER_CRT_FILE

from nnunet_flare.provision.application import ApplicationValidator
from nnunet_flare.provision.policy import CLIENT_CLASSES, SERVER_CLASSES

JOBS = Path(__file__).parents[2] / "jobs"
PROCESS = "nnunet_flare.nnunet.process.NNUNetProcess"


@pytest.fixture(params=["ffe", "asym_fedavg"])
def app(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The app of a committed job as it is submitted: signed, without the simulator's marker."""
    app = tmp_path / "app"
    shutil.copytree(JOBS / request.param / "app", app, ignore=shutil.ignore_patterns("custom"))
    for folder in (app, app / "config"):
        (folder / NVFLARE_SIG_FILE).write_text("{}")
        (folder / NVFLARE_SUBMITTER_CRT_FILE).write_text("")
    return app


def verdict(app: Path, *, server: bool = False) -> str:
    return ApplicationValidator(server=server).validate(str(app))[0]


def change(app: Path, part: str, values: Mapping[str, Any]) -> None:
    file = app / "config" / f"config_fed_{part}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("server", [True, False])
def test_our_jobs_pass(app: Path, server: bool):
    assert verdict(app, server=server) == ""


@pytest.mark.parametrize(
    "file",
    [
        "custom/code.py",
        "custom/README",
        "config/code.py",
        "config/comm_config.json",
        "config/resources.json",
        "config/config_fed_client.conf",
        "config/log_config.json",
        "drivers/code.py",
        "comm_config.json",
    ],
)
def test_any_other_file_is_refused_by_name_at_server_and_site(app: Path, file: str):
    (app / file).parent.mkdir(exist_ok=True)
    (app / file).write_text("{}")
    for server in (True, False):
        assert f"found {file}" in verdict(app, server=server).replace(f"{Path(file).parent.as_posix()}, ", "")


def test_files_in_a_folder_that_is_named_like_a_signature_are_refused(app: Path):
    folder = app / "config" / NVFLARE_SIG_FILE
    folder.unlink()
    folder.mkdir()
    (folder / "code.py").write_text("")
    assert f"found config/{NVFLARE_SIG_FILE}/code.py" in verdict(app)


@pytest.mark.parametrize("key", ["path", "class_path", "name"])
@pytest.mark.parametrize(
    "place",
    [
        lambda item: {"components": [{"id": "x"} | item]},
        lambda item: {"task_result_filters": [{"tasks": ["*"], "filters": [item]}]},
        lambda item: {"executors": [{"tasks": ["*"], "executor": {"path": CLIENT_CLASSES[0], "args": {"x": item}}}]},
        lambda item: {"elsewhere": {"deep": [[item]]}},
    ],
)
def test_a_class_that_is_not_listed_is_refused_by_name_wherever_it_stands(app: Path, key: str, place: Any):
    change(app, "client", place({key: PROCESS}))
    assert f"found {PROCESS};" in verdict(app)


@pytest.mark.parametrize("path", ["{variable}", CLIENT_CLASSES[0] + ".x", "", None, ["a"]])
def test_only_the_very_name_of_a_listed_class_passes(app: Path, path: Any):
    change(app, "client", {"components": [{"id": "x", "path": path}], "variable": CLIENT_CLASSES[0]})
    assert "config_fed_client.json: expected classes among" in verdict(app)


def test_a_class_of_the_server_is_refused_at_a_site(app: Path):
    change(app, "client", {"components": [{"id": "x", "path": SERVER_CLASSES[0]}]})
    assert f"found {SERVER_CLASSES[0]}" in verdict(app)


@pytest.mark.parametrize("content", ["[]", "no json", "[" * 100_000, "\xff"])
def test_a_configuration_that_is_no_object_is_refused(app: Path, content: str):
    (app / "config" / "config_fed_client.json").write_text(content, encoding="latin-1")
    assert "expected a JSON object" in verdict(app)


@pytest.mark.parametrize("path", [PROCESS, "nvflare.app_common.workflows.fedavg.FedAvg"])
def test_flares_own_check_with_our_list_refuses_the_same(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    policy = {"class_allow_list": list(SERVER_CLASSES), "class_list_enforcement_mode": "enforce"}
    (tmp_path / "resources.json").write_text(json.dumps(policy))
    authorizer = ComponentPathAuthorizer()
    monkeypatch.setattr(authorizer, "_get_resources_file_path", lambda **_: str(tmp_path / "resources.json"))
    authorizer.authorize_component_config({"path": SERVER_CLASSES[0]})
    with pytest.raises(UnsafeComponentError, match="not in allow_list"):
        authorizer.authorize_component_config({"path": path})


def test_an_app_that_cannot_be_looked_at_is_refused(app: Path, monkeypatch: pytest.MonkeyPatch):
    def unreadable(folder: Path, pattern: str) -> None:
        raise PermissionError(13, "Permission denied", "/site/secret")

    monkeypatch.setattr(Path, "rglob", unreadable)
    assert verdict(app) == "job: cannot be checked (PermissionError)"
