"""The whole protocol, controller and executors, in one process (``loopback``)."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from nvflare.apis.dxo import from_shareable

from conftest import TINY_TRAINING
from loopback import Loopback
from nnunet_flare.flare.history import RunHistory
from nnunet_flare.flare.protocol import TRAIN
from nnunet_flare.flare.results import RESULTS_FOLDER
from nnunet_flare.flare.run import RunFolder
from nnunet_flare.storage import read_json

SITES = ("site-1", "site-2")


def test_a_run_ends_with_a_model_scores_and_curves(demo_home: Path, tmp_path: Path):
    federation = Loopback(tmp_path, SITES)
    federation.run("whole", TINY_TRAINING)
    assert federation.panics == []
    folder = demo_home / "server" / "runs" / "whole"
    history = RunHistory.load(folder)
    assert history.phase == "done"
    assert [record.round for record in history.rounds] == [1, 2, 3]
    assert set(history.final) == set(SITES)
    for artifact in set(history.artifacts.values()) - {"tensorboard"}:
        assert (folder / artifact).exists()
    assert len(federation.scalars["dice/site-2"]) == 3
    assert len(federation.scalars["train_loss/mean"]) == 3
    for site in SITES:
        model = demo_home / site / "runs" / "whole" / "nnUNet_results" / "Dataset900_Demo"
        assert (model / "nnUNetTrainer__nnUNetPlans__2d" / "fold_0" / "checkpoint_final.pth").exists()


def test_no_case_name_leaves_a_site(demo_home: Path, tmp_path: Path):
    federation = Loopback(tmp_path, SITES)
    federation.run("quiet", TINY_TRAINING | {"num_rounds": 1})
    assert federation.panics == []
    cases = {
        file.name.removesuffix(".nii.gz")
        for site in SITES
        for file in (demo_home / site / "nnUNet_raw" / "Dataset900_Demo" / "labelsTr").iterdir()
    }
    assert len(cases) >= 5
    for site, task, _, reply in federation.sent:
        found = [case for case in cases if case.encode() in reply]
        assert not found, f"{site} named a case in its reply to {task}"


def _train_layers(federation: Loopback) -> dict[str, dict[str, np.ndarray]]:
    from nvflare.fuel.utils import fobs

    return {site: from_shareable(fobs.loads(reply)).data for site, task, _, reply in federation.sent if task == TRAIN}


def _final_layers(home: Path, run: str) -> dict[str, np.ndarray]:
    newest = sorted((home / "server" / "runs" / run / "state").glob("global_*.npz"))[-1]
    with np.load(newest) as stored:
        return dict(stored)


@pytest.mark.parametrize("weighting", ["cases", "uniform"])
@pytest.mark.parametrize("update", ["difference", "weights"])
def test_one_round_equals_the_weighted_mean_of_the_sites(demo_home, tmp_path, demo_data, update, weighting):
    from nvflare.fuel.utils import fobs

    # site-2 keeps three of its five cases, so that the weights differ
    dataset = demo_home / "site-2" / "nnUNet_raw" / "Dataset900_Demo"
    names = sorted(file.name.removesuffix(".nii.gz") for file in (dataset / "labelsTr").iterdir())
    splits = [{"train": names[:2], "val": names[2:]}]
    (dataset / "splits_final.json").write_text(json.dumps(splits))
    federation = Loopback(tmp_path, SITES)
    settings = {"num_rounds": 1, "update": update, "weighting": weighting}
    federation.run("mean", TINY_TRAINING | settings)
    assert federation.panics == []
    sent = _train_layers(federation)
    received = next(
        from_shareable(fobs.loads(request)).data for _, task, request, _ in federation.sent if task == TRAIN
    )
    weights = {"cases": (4, 2), "uniform": (1, 1)}[weighting]
    final = _final_layers(demo_home, "mean")
    assert final.keys() == received.keys()
    for name in final:
        mean = np.average([sent[site][name].astype(np.float64) for site in SITES], axis=0, weights=weights)
        expected = mean + received[name] if update == "difference" else mean
        np.testing.assert_allclose(final[name], expected, rtol=1e-6, atol=1e-7)


def test_rounds_go_on_where_a_stopped_run_left_off(demo_home, tmp_path, monkeypatch):
    whole = Loopback(tmp_path, SITES)
    whole.run("whole", TINY_TRAINING)
    expected = _final_layers(demo_home, "whole")

    def lose_site_2_in_round_2(site, task, reply):
        rounds.append(site) if task == TRAIN else None
        return None if task == TRAIN and rounds.count("site-2") == 2 and site == "site-2" else reply

    rounds: list[str] = []
    broken = Loopback(tmp_path, SITES, tamper=lose_site_2_in_round_2)
    broken.run("broken", TINY_TRAINING)
    assert "site-2" in broken.panics[0]
    assert RunHistory.load(demo_home / "server/runs/broken").phase == "failed"
    resumed = Loopback(tmp_path, SITES)
    resumed.run("broken", TINY_TRAINING)
    assert resumed.panics == []
    history = RunHistory.load(demo_home / "server/runs/broken")
    assert [record.round for record in history.rounds] == [1, 2, 3]
    final = _final_layers(demo_home, "broken")
    for name, array in expected.items():
        np.testing.assert_array_equal(final[name], array)


@pytest.fixture
def submitted(demo_home: Path, tmp_path: Path) -> Loopback:
    federation = Loopback(tmp_path, SITES)
    federation.job_folder = tmp_path / "job"
    return federation


def outcome(federation: Loopback) -> dict | None:
    return read_json(federation.job_folder / RESULTS_FOLDER / "outcome.json")["error"]


@pytest.mark.usefixtures("inline")
def test_a_finished_run_whose_job_was_lost_is_handed_over_and_no_site_is_asked(submitted, demo_home, tmp_path):
    settings = TINY_TRAINING | {"num_rounds": 1}
    submitted.series = "one"
    submitted.run("heart", settings)
    results = {file.name: file.read_bytes() for file in (submitted.job_folder / RESULTS_FOLDER).glob("*.*")}
    assert {"layers.npz", "metrics.json"} <= results.keys()
    asked, submitted.job_folder = len(submitted.sent), tmp_path / "next"
    submitted.run("heart", settings)
    assert submitted.panics == []
    assert len(submitted.sent) == asked
    assert {file.name: file.read_bytes() for file in (submitted.job_folder / RESULTS_FOLDER).glob("*.*")} == results
    submitted.series = "two"
    submitted.run("heart", settings)
    assert len(submitted.sent) == 2 * asked
    assert len(list((demo_home / "server" / "runs" / "archive").iterdir())) == 1


@pytest.mark.usefixtures("inline")
def test_a_run_whose_results_find_no_room_fails_and_its_next_job_leaves_them(submitted, monkeypatch):
    settings = TINY_TRAINING | {"num_rounds": 1}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(RunFolder, "newest_globals", full)
        submitted.run("heart", settings)
    assert "files of the run: expected files that can be read and written, found No space left" in submitted.panics[0]
    assert outcome(submitted)["code"] == "state"
    asked = len(submitted.sent)
    submitted.run("heart", settings)
    assert submitted.panics == []
    assert len(submitted.sent) == asked
    assert outcome(submitted) is None
    assert (submitted.job_folder / RESULTS_FOLDER / "layers.npz").is_file()


@pytest.mark.usefixtures("inline")
def test_a_full_disk_that_takes_no_reason_either_ends_the_job_all_the_same(submitted, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunHistory, "save", full)
    submitted.run("heart", TINY_TRAINING)
    assert "found No space left on device" in submitted.panics[0]
