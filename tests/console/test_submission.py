"""What may be sent: a job that a recipe exports, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import TINY_TRAINING
from nnunet_flare.aggregation.sharing import SharingConfig
from nnunet_flare.console.submission import prepare_job, read_controller
from nnunet_flare.errors import ConfigError
from nnunet_flare.flare.config import FederationConfig
from nnunet_flare.nnunet.config import TrainingConfig
from nnunet_flare.recipe import JOBS as RECIPES
from nnunet_flare.recipe import AsymFedAvgRecipe, FFERecipe

JOBS = Path(__file__).parents[2] / "jobs"
SERVER, CLIENT = "app/config/config_fed_server.json", "app/config/config_fed_client.json"


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return Path(shutil.copytree(JOBS / "ffe", tmp_path / "ffe"))


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def refusal(job: Path, tmp_path: Path) -> str:
    with pytest.raises(ConfigError) as refused:
        prepare_job(job, tmp_path / "workspace")
    return str(refused.value)


@pytest.mark.parametrize("name", RECIPES)
def test_a_committed_job_is_sent_as_it_is_but_without_the_marker(name: str, tmp_path: Path):
    prepared = prepare_job(JOBS / name, tmp_path)
    assert prepared.run == prepared.folder.name == name
    files = {str(file.relative_to(prepared.folder)) for file in prepared.folder.rglob("*") if file.is_file()}
    assert files == {"meta.json", SERVER, CLIENT}
    assert not (prepared.folder / "app" / "custom").exists()
    for file in files:
        assert json.loads((prepared.folder / file).read_text()) == json.loads((JOBS / name / file).read_text())
    assert (JOBS / name / "app" / "custom" / "README").exists()


def test_a_job_with_settings_of_every_kind_passes(tmp_path: Path):
    training, federation = TrainingConfig(**TINY_TRAINING), FederationConfig(min_sites=2, cross_site=True, num_gpus=1)
    FFERecipe(name="one", training=training, federation=federation, keep_local=["norm"]).export(str(tmp_path))
    sharing = SharingConfig(sharing="cohort", alignment="resolution")
    AsymFedAvgRecipe(name="two", training=training, sharing=sharing).export(str(tmp_path))
    one = prepare_job(tmp_path / "one", tmp_path / "workspace")
    assert one.min_sites == 2
    asked = json.loads((one.folder / "meta.json").read_text())["launcher_spec"]
    assert asked == {"default": {"k8s": {"num_of_gpus": 1}, "slurm": {"gpus_per_node": 1}}}
    assert prepare_job(tmp_path / "two", tmp_path / "workspace").min_sites is None


def test_a_default_may_be_stated(job: Path, tmp_path: Path):
    edit(job / SERVER, lambda server: server["workflows"][0]["args"]["training"].update(fold=0))
    assert prepare_job(job, tmp_path / "workspace").run == "ffe"


def test_the_controllers_settings_can_be_read(job: Path):
    assert read_controller(job).training["num_rounds"] == 8


@pytest.mark.parametrize("file", ["app/custom/evil.py", "app/custom/nnunet_flare/__init__.py", "app/custom/README.py"])
def test_code_in_the_job_is_refused(job: Path, tmp_path: Path, file: str):
    (job / file).parent.mkdir(exist_ok=True)
    (job / file).write_text("print('no')")
    assert f"job: {file}: expected no code but that of the package, found an additional file" in refusal(job, tmp_path)


@pytest.mark.parametrize("file", ["app_site-1/config/config_fed_client.json", "app/config/log_config.json", "note.txt"])
def test_an_additional_file_is_refused(job: Path, tmp_path: Path, file: str):
    (job / file).parent.mkdir(parents=True, exist_ok=True)
    (job / file).write_text("{}")
    assert f"job: {file}: expected the files of a recipe, found an additional file" in refusal(job, tmp_path)


def test_a_link_to_a_folder_of_code_is_refused(job: Path, tmp_path: Path):
    (job / "app" / "custom" / "more").symlink_to(tmp_path)
    assert "job: app/custom/more: expected no code" in refusal(job, tmp_path)


def test_a_missing_file_is_refused(job: Path, tmp_path: Path):
    (job / CLIENT).unlink()
    assert f"job: {CLIENT}: expected the files of a recipe, found no such file" in refusal(job, tmp_path)


FILTER = {"tasks": ["train"], "filters": [{"path": "nvflare.app_common.filters.exclude_vars.ExcludeVars"}]}
COMPONENT = {"id": "more", "path": "nvflare.app_common.widgets.event_recorder.ServerEventRecorder", "args": {}}


@pytest.mark.parametrize(
    ("file", "change", "key"),
    [
        (SERVER, lambda c: c["components"].append(COMPONENT), "components.1"),
        (CLIENT, lambda c: c["components"].append(COMPONENT), "components.0"),
        (SERVER, lambda c: c["task_data_filters"].append(FILTER), "task_data_filters.0"),
        (CLIENT, lambda c: c["task_result_filters"].append(FILTER), "task_result_filters.0"),
        (CLIENT, lambda c: c["executors"].append(c["executors"][0]), "executors.1"),
        (CLIENT, lambda c: c["executors"][0]["executor"].update(path="os.system"), "executors.0.executor.path"),
        (CLIENT, lambda c: c["executors"][0]["tasks"].append("*"), "executors.0.tasks.10"),
        (SERVER, lambda c: c["server"].update(task_request_interval=True), "server.task_request_interval"),
        (SERVER, lambda c: c.update(extra=1), "extra"),
        (CLIENT, lambda c: c.pop("get_task_timeout"), "get_task_timeout"),
        ("meta.json", lambda c: c.update(name="other"), "name"),
        ("meta.json", lambda c: c.update(scope="lenient"), "scope"),
        ("meta.json", lambda c: c["deploy_map"].update(app=["server", "site-1"]), "deploy_map.app.0"),
    ],
)
def test_what_no_recipe_writes_is_refused_with_file_and_key(job: Path, tmp_path: Path, file, change, key):
    edit(job / file, change)
    assert f"job: {file}: {key}: expected" in refusal(job, tmp_path)


@pytest.mark.parametrize(
    ("file", "change", "key"),
    [
        (CLIENT, lambda c: c["task_result_filters"].clear(), "task_result_filters.0"),
        (CLIENT, lambda c: c["task_data_filters"][0]["tasks"].remove("train"), "task_data_filters.0.tasks."),
        (SERVER, lambda c: c["workflows"][0]["args"].pop("encryption"), "executors.0.tasks.10"),
    ],
)
def test_an_encrypted_job_is_sent_whole_or_not_at_all(tmp_path: Path, file, change, key):
    job = Path(shutil.copytree(JOBS / "ffe_he", tmp_path / "ffe_he"))
    edit(job / file, change)
    assert f": {key}" in refusal(job, tmp_path)


def test_a_second_workflow_is_refused(job: Path, tmp_path: Path):
    edit(job / SERVER, lambda server: server["workflows"].append(server["workflows"][0]))
    assert "workflows: expected one controller" in refusal(job, tmp_path)


@pytest.mark.parametrize(
    "path", ["nvflare.app_common.ccwf.SwarmServerController", "nnunet_flare.flare.controller.FederatedTraining"]
)
def test_a_foreign_controller_is_refused(job: Path, tmp_path: Path, path: str):
    edit(job / SERVER, lambda server: server["workflows"][0].update(path=path))
    assert "workflows.0.path: expected one of nnunet_flare.flare.ffe.FFEController, " in refusal(job, tmp_path)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"training": {"num_round": 3}}, "training settings: expected settings among"),
        ({"training": {"num_rounds": 0}}, "num_rounds: expected a positive integer, found 0"),
        ({"federation": {"min_site": 2}}, "federation settings: expected settings among"),
        ({"sharing": {"sharing": "common"}}, "workflows.0.args: expected the controller's settings"),
        ({"training": 3}, "workflows.0.args: expected the controller's settings"),
        ({"run": "../elsewhere"}, "run: expected letters, digits, dot, dash and underscore"),
        ({"run": 3}, "run: expected letters, digits, dot, dash and underscore"),
    ],
)
def test_a_setting_that_is_unknown_or_wrong_is_refused(job: Path, tmp_path: Path, settings, complaint: str):
    edit(job / SERVER, lambda server: server["workflows"][0]["args"].update(settings))
    assert complaint in refusal(job, tmp_path)


def test_an_unknown_setting_of_sharing_is_refused(tmp_path: Path):
    job = Path(shutil.copytree(JOBS / "asym_fedavg", tmp_path / "asym_fedavg"))
    edit(job / SERVER, lambda server: server["workflows"][0]["args"].update(sharing={"shared": "all"}))
    assert "expected settings among" in refusal(job, tmp_path)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"workflows": 3}', '{"workflows": [{"path": "x"}]}'])
def test_a_folder_that_is_no_job_is_refused(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "job" / SERVER).parent.mkdir(parents=True)
        (tmp_path / "job" / SERVER).write_text(content)
    assert refusal(tmp_path / "job", tmp_path).startswith("job: ")
