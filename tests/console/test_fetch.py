"""What a job leaves at the server, and what becomes of it at the submitter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import TINY_TRAINING
from inline import InlineProcess
from loopback import Loopback
from nnunet_flare.aggregation.sharing import SharingConfig
from nnunet_flare.console.fetch import fetch_results
from nnunet_flare.console.outcome import read_outcome
from nnunet_flare.console.session import Job
from nnunet_flare.errors import ConfigError, DatasetError, PlansError, StateError
from nnunet_flare.flare.asym import AsymFedAvgController
from nnunet_flare.flare.history import RunHistory
from nnunet_flare.flare.results import RESULTS_FOLDER, leave_results
from nnunet_flare.flare.run import RunFolder
from nnunet_flare.nnunet.config import TrainingConfig
from nnunet_flare.recipe import AsymFedAvgRecipe, FFERecipe

SITES = ("site-1", "site-2")


class FakeStore:
    """A server that keeps one job's folder."""

    def __init__(self, folder: Path, status: str = "FINISHED:COMPLETED") -> None:
        self.folder, self.status = folder, status

    def jobs(self, run: str) -> list[Job]:
        return [Job(id="2", run=run, status="RUNNING"), Job(id="1", run=run, status=self.status)]

    def download(self, job_id: str) -> Path:
        assert job_id == "1"
        return Path(shutil.copytree(self.folder, self.folder.with_name("download")))


def store_of(run: str, home: Path, folder: Path, recipe) -> FakeStore:
    """What FLARE keeps of a job whose run lies in ``home``."""
    recipe.export(str(folder / "job"))
    held = RunFolder(home / "server", run)
    leave_results(held, folder / "workspace", with_weights=True)
    held.close()
    return FakeStore(folder)


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("folds", [0, [0, 1]])
def test_the_model_built_here_is_the_one_that_the_server_built(demo_home: Path, tmp_path: Path, monkeypatch, folds):
    monkeypatch.setattr("nnunet_flare.console.fetch.NNUNetProcess", InlineProcess)
    settings = TINY_TRAINING | {"fold": folds, "num_rounds": 1}
    federation = Loopback(tmp_path, SITES)
    federation.run("heart", settings)
    assert federation.panics == []
    recipe = FFERecipe(name="heart", training=TrainingConfig(**settings))
    store = store_of("heart", demo_home, tmp_path / "store", recipe)
    assert not list(store.folder.rglob("*.pth"))

    fetch_results(store, "heart", tmp_path / "out")
    run = demo_home / "server" / "runs" / "heart"
    for fold in (0,) if folds == 0 else folds:
        file = Path("model", f"fold_{fold}", "checkpoint_final.pth")
        ours, theirs = (torch.load(place / file, weights_only=False) for place in (tmp_path / "out", run))
        assert ours["init_args"] == theirs["init_args"]
        assert ours["inference_allowed_mirroring_axes"] == theirs["inference_allowed_mirroring_axes"]
        for name, tensor in theirs["network_weights"].items():
            assert torch.equal(ours["network_weights"][name], tensor)
    for name in ("plans.json", "dataset.json", "dataset_fingerprint.json"):
        assert (tmp_path / "out/model" / name).read_text() == (run / "model" / name).read_text()
    histories = list((tmp_path / "out").rglob("metrics.json"))
    assert len(histories) == (1 if folds == 0 else 2)
    assert all(RunHistory.load(file.parent).phase == "done" for file in histories)
    assert not (tmp_path / "download").exists()


@pytest.mark.usefixtures("inline")
def test_of_a_run_with_local_layers_come_scores_coverage_and_the_shared_layers(mixed: Path, tmp_path: Path):
    settings = TINY_TRAINING | {"dataset": "Dataset902_DemoMixed", "num_rounds": 1}
    federation = Loopback(tmp_path, SITES)
    federation.run("heart", settings, sharing={"alignment": "name"}, kind=AsymFedAvgController)
    assert federation.panics == []
    training, sharing = TrainingConfig(**settings), SharingConfig(alignment="name")
    recipe = AsymFedAvgRecipe(name="heart", training=training, sharing=sharing)
    fetch_results(store_of("heart", mixed, tmp_path / "store", recipe), "heart", tmp_path / "out")
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files >= {"metrics.json", "metrics.csv", "coverage.json", "coverage.png", "layers.npz"}
    assert "model" not in files
    with np.load(tmp_path / "out" / "layers.npz", allow_pickle=False) as layers:
        assert layers.files


def test_plans_that_name_foreign_code_are_refused(tmp_path: Path):
    results = tmp_path / "store" / "workspace" / RESULTS_FOLDER
    (results / "model").mkdir(parents=True)
    architecture = {"network_class_name": "os.system", "arch_kwargs": {}, "_kw_requires_import": []}
    plans = {"configurations": {"2d": {"architecture": architecture}}}
    for name, content in (("plans", plans), ("dataset", {}), ("dataset_fingerprint", {})):
        (results / "model" / f"{name}.json").write_text(json.dumps(content))
    (results / "outcome.json").write_text("{}")
    FFERecipe(name="heart", training=TrainingConfig(**TINY_TRAINING)).export(str(tmp_path / "store" / "job"))
    with pytest.raises(PlansError, match="network_class_name"):
        fetch_results(FakeStore(tmp_path / "store"), "heart", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_that_has_not_finished_has_no_results(tmp_path: Path):
    store = FakeStore(tmp_path / "store", status="FINISHED:ABORTED")
    with pytest.raises(StateError, match="run heart: expected a finished job, found none"):
        fetch_results(store, "heart", tmp_path / "out")


def test_what_is_there_is_never_overwritten(tmp_path: Path):
    with pytest.raises(ConfigError, match="--out: expected a folder to make"):
        fetch_results(FakeStore(tmp_path / "store"), "heart", tmp_path)


def test_a_failed_job_leaves_its_reason_and_no_weights(tmp_path: Path):
    held = RunFolder(tmp_path / "server", "heart")
    held.begin({"num_rounds": 3})
    held.save_global(1, {"layer": np.zeros(3, np.float32)})
    RunHistory(run_name="heart", run_id="1", num_rounds=3, started=0.0).save(held.path)
    reason = DatasetError(
        field="labels", expected="two", found="three", remedy="correct them", site="site-2", local_detail="/secret"
    )
    leave_results(held, tmp_path / "store" / "workspace", reason)
    held.close()
    assert not list(tmp_path.glob("store/**/*.npz"))
    assert not any("/secret" in file.read_text() for file in tmp_path.glob("store/**/*.json"))
    failed = Job(id="1", run="heart", status="FINISHED:EXECUTION_EXCEPTION")
    outcome = read_outcome(FakeStore(tmp_path / "store"), failed)
    assert isinstance(outcome.error, DatasetError)
    assert str(outcome.error) == "site-2: labels: expected two, found three; correct them"
    assert outcome.history.run_name == "heart"
    assert not (tmp_path / "download").exists()


def test_a_run_whose_folder_another_job_holds_leaves_the_reason_alone(tmp_path: Path):
    reason = StateError(field="folder of heart", expected="a", found="another process holds its lock", remedy="wait")
    leave_results(None, tmp_path / "store" / "workspace", reason)
    outcome = read_outcome(FakeStore(tmp_path / "store"), Job(id="1", run="heart", status="FINISHED:ABNORMAL"))
    assert "another process holds its lock" in str(outcome.error)


def test_results_that_the_server_did_not_keep_are_named_as_missing(tmp_path: Path):
    FFERecipe(name="heart", training=TrainingConfig(**TINY_TRAINING)).export(str(tmp_path / "store" / "job"))
    store, complete = FakeStore(tmp_path / "store"), Job(id="1", run="heart", status="FINISHED:COMPLETED")
    missing = "expected the results of a complete job, found none"
    with pytest.raises(StateError, match=missing):
        fetch_results(store, "heart", tmp_path / "out")
    shutil.rmtree(tmp_path / "download")
    with pytest.raises(StateError, match=missing):
        read_outcome(store, complete)
    assert not (tmp_path / "out").exists()
