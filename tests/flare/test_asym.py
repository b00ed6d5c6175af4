"""Asymmetric federated averaging in one process (``loopback``): unlike networks, shared in part."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nvflare.apis.dxo import from_shareable
from nvflare.fuel.utils import fobs

from conftest import TINY_TRAINING, settings_of
from loopback import Loopback
from nnunet_flare.aggregation.sharing import Sharing
from nnunet_flare.flare.asym import AsymFedAvgController
from nnunet_flare.flare.history import RunHistory
from nnunet_flare.flare.protocol import FINAL_MODEL, TRAIN
from nnunet_flare.nnunet.model import read_weights
from nnunet_flare.nnunet.process import NNUNetProcess
from nnunet_flare.report.status import status_text
from nnunet_flare.storage import read_json

SITES = ("site-1", "site-2", "site-3")
MIXED = TINY_TRAINING | {"dataset": "Dataset902_DemoMixed"}


def run_of(home: Path, run: str) -> Path:
    return home / "server" / "runs" / run


def own_copy(home: Path, site: str) -> None:
    """Give the site raw data that a test may change."""
    shared = (home / site / "nnUNet_raw").resolve()
    (home / site / "nnUNet_raw").unlink()
    shutil.copytree(shared, home / site / "nnUNet_raw")


def edit_dataset(home: Path, site: str, **values: object) -> None:
    file = home / site / "nnUNet_raw" / "Dataset902_DemoMixed" / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def model_of(home: Path, site: str, run: str) -> Path:
    results = home / site / "runs" / run / "nnUNet_results" / "Dataset902_DemoMixed"
    return results / "nnUNetTrainer__nnUNetPlans__2d"


def test_unlike_networks_train_together_and_only_shared_layers_leave_a_site(mixed: Path, tmp_path: Path, inline: None):
    federation = Loopback(tmp_path, SITES)
    training = MIXED | {"num_rounds": 2, "update": "weights"}  # the last update then holds what is in the final model
    federation.run("asym", training, sharing={"alignment": "name"}, kind=AsymFedAvgController)
    assert federation.panics == []
    folder = run_of(mixed, "asym")
    assert RunHistory.load(folder).phase == "done"
    sharing = Sharing.from_json(read_json(folder / "sharing.json"))
    depths = {site: sum(".transpconvs." in name for name in network) for site, network in sharing.networks.items()}
    assert len(set(depths.values())) > 1
    assert (folder / "coverage.png").stat().st_size > 1000
    coverage = json.loads((folder / "coverage.json").read_text())
    assert 0.1 < min(site["shared"] for site in coverage.values()) < 1
    for site in SITES:
        shared = set(sharing.names_of(site))
        trained = [sent for sent in federation.sent if sent[:2] == (site, TRAIN)]
        assert len(trained) == 2
        for *_, request, reply in trained:
            assert set(from_shareable(fobs.loads(request)).data) == shared
            assert set(from_shareable(fobs.loads(reply)).data) == shared
        weights = read_weights(model_of(mixed, site, "asym") / "fold_0" / "checkpoint_final.pth")
        kept = sharing.networks[site].keys() - shared
        assert kept
        left = b"".join(reply for sender, *_, reply in federation.sent if sender == site)
        for name in kept:
            assert weights[name].numpy().tobytes()[:256] not in left


def test_a_site_whose_child_is_killed_misses_that_round_and_is_back_in_the_next(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    call = NNUNetProcess.call

    def killed_in_round_3(self, command, arguments, layers=None, **others):
        if command == "train" and (arguments["round_number"], arguments["settings"]["site"]) == (2, "site-2"):
            others["progress"] = lambda *step: os.kill(self._process.pid, signal.SIGKILL)
        return call(self, command, arguments, layers, **others)

    monkeypatch.setattr(NNUNetProcess, "call", killed_in_round_3)
    federation = Loopback(tmp_path, SITES)
    short = MIXED | {"num_rounds": 6, "iterations_per_epoch": 3}
    federation.run("killed", short, federation={"min_sites": 2}, kind=AsymFedAvgController)
    assert federation.panics == []
    history = RunHistory.load(run_of(mixed, "killed"))
    assert history.phase == "done"
    assert [sorted(record.sites) for record in history.rounds] == [
        [site for site in SITES if (site, record.round) != ("site-2", 3)] for record in history.rounds
    ]
    assert [set(record.missing) for record in history.rounds] == [set(), set(), {"site-2"}, set(), set(), set()]
    assert "signal 9" in history.rounds[2].missing["site-2"]
    assert set(history.final) == set(SITES)
    assert all(0 <= site.foreground.dsc <= 1 for site in history.final.values())


def test_sites_with_equal_shapes_but_other_label_numbers_are_refused(mixed: Path, tmp_path: Path, inline: None):
    own_copy(mixed, "site-2")
    edit_dataset(mixed, "site-2", labels={"background": 0, "MYO": 1, "RV": 2, "LV": 3})
    federation = Loopback(tmp_path, SITES)
    federation.run("labels", MIXED, kind=AsymFedAvgController)
    assert len(federation.panics) == 1
    assert "site-2: dataset.json: labels: MYO: expected 2 as at site-1, found 1" in federation.panics[0]


def test_a_site_with_its_own_labels_keeps_its_heads(mixed: Path, tmp_path: Path, inline: None):
    own_copy(mixed, "site-2")
    edit_dataset(mixed, "site-2", labels={"background": 0, "RV": 1, "MYO": 2, "scar": 3})
    federation = Loopback(tmp_path, SITES)
    settings = MIXED | {"stop_after": "preprocess"}
    federation.run("own", settings, sharing={"sharing": "cohort"}, kind=AsymFedAvgController)
    assert federation.panics == []
    sharing = Sharing.from_json(read_json(run_of(mixed, "own") / "sharing.json"))
    heads = {site: {name for name in sharing.names_of(site) if "seg_layers" in name} for site in SITES}
    assert heads["site-1"]
    assert heads["site-1"] & heads["site-3"]
    assert not heads["site-2"]


def test_too_little_in_common_ends_the_job_before_the_first_round(mixed: Path, tmp_path: Path, inline: None):
    federation = Loopback(tmp_path, SITES)
    federation.run("little", MIXED, sharing={"min_overlap": 0.95}, kind=AsymFedAvgController)
    assert len(federation.panics) == 1
    assert "site-1: shared layers: expected at least 95%" in federation.panics[0]
    assert TRAIN not in {task for _, task, _, _ in federation.sent}
    federation.run("little", MIXED | {"stop_after": "preprocess"}, kind=AsymFedAvgController)
    assert federation.panics == []  # nothing stands in the way of another try


def test_a_phase_that_the_job_does_not_have_is_no_place_to_stop(mixed: Path, tmp_path: Path, inline: None):
    federation = Loopback(tmp_path, SITES)
    federation.run("stop", MIXED | {"stop_after": "fingerprint"}, kind=AsymFedAvgController)
    assert "stop_after: expected one of plan, preprocess, found fingerprint" in federation.panics[0]


def test_a_round_with_too_few_replies_ends_the_job_and_a_new_submission_goes_on(
    mixed: Path, tmp_path: Path, inline: None
):
    rounds = []

    def silent(site, task, reply):
        rounds.append((site, task))
        late = task == TRAIN and site != "site-1" and rounds.count((site, task)) == 2
        return None if late else reply

    federation = Loopback(tmp_path, SITES, silent)
    training = MIXED | {"num_rounds": 3}
    federation.run("few", training, federation={"min_sites": 2}, kind=AsymFedAvgController)
    assert len(federation.panics) == 1
    for part in ("updates in round 2", "expected at least 2", "site-2", "site-3", "submit again"):
        assert part in federation.panics[0]
    federation.run("few", training, federation={"min_sites": 2}, kind=AsymFedAvgController)
    assert federation.panics == []
    history = RunHistory.load(run_of(mixed, "few"))
    assert [record.round for record in history.rounds] == [1, 2, 3]
    assert rounds.count(("site-1", TRAIN)) == 4  # round 1 was not repeated


def test_a_site_that_returns_with_another_network_is_refused(mixed: Path, tmp_path: Path, inline: None):
    def absent(site, task, reply):
        return None if task == TRAIN else reply

    federation = Loopback(tmp_path, SITES, absent)
    federation.run("changed", MIXED, kind=AsymFedAvgController)
    assert "updates in round 1" in federation.panics[0]
    (mixed / "site-2" / "runs" / "changed" / "plans.json").unlink()
    settings_of("site-2", tmp_path, plans_overrides={"architecture.arch_kwargs.n_conv_per_stage": [1, 1, 1]})
    federation.run("changed", MIXED, kind=AsymFedAvgController)
    assert re.search(r"site-2: layer .*\(as when the run started\), found no such layer", federation.panics[0])


def test_a_site_that_was_not_there_at_the_start_joins_at_the_next_submission(mixed: Path, tmp_path: Path, inline: None):
    def until_round_2(site, task, reply):
        return None if task == TRAIN and sum(sent[1] == TRAIN for sent in federation.sent) > 2 else reply

    federation = Loopback(tmp_path, SITES[:2], until_round_2)
    training = MIXED | {"num_rounds": 2}
    federation.run("late", training, kind=AsymFedAvgController)
    assert "updates in round 2" in federation.panics[0]
    federation.sites, federation.tamper = SITES, lambda site, task, reply: reply
    federation.run("late", training, kind=AsymFedAvgController)
    assert federation.panics == []
    history = RunHistory.load(run_of(mixed, "late"))
    assert [sorted(record.sites) for record in history.rounds] == [["site-1", "site-2"], ["site-1", "site-2", "site-3"]]
    sharing = Sharing.from_json(read_json(run_of(mixed, "late") / "sharing.json"))
    assert sharing.names_of("site-3")


def test_models_that_may_travel_are_scored_on_every_site(mixed: Path, tmp_path: Path, inline: None):
    for site in SITES[:2]:
        settings_of(site, tmp_path, share_model=True)
    federation = Loopback(tmp_path, SITES)
    training = MIXED | {"num_rounds": 1}
    federation.run("cross", training, federation={"cross_site": True}, kind=AsymFedAvgController)
    assert federation.panics == []
    history = RunHistory.load(run_of(mixed, "cross"))
    assert {owner: set(scores) for owner, scores in history.cross_site.items()} == {
        "site-1": set(SITES),
        "site-2": set(SITES),
        "site-3": {"site-3"},  # its settings do not let its model travel
    }
    assert "mean DSC across sites" in status_text(run_of(mixed, "cross"))
    whole = [sent for sent in federation.sent if sent[0] == "site-3" and sent[1] == FINAL_MODEL]
    assert all("error" in json.loads(fobs.loads(reply)["DXO"]["data"]["nnunet_flare"]) for *_, reply in whole)

    # the scores are those of nnU-Net's own prediction with the site's own folder
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model_of(mixed, "site-1", "cross")), (0,))
    raw = mixed / "site-2" / "nnUNet_raw" / "Dataset902_DemoMixed"
    splits = next((mixed / "site-2" / "nnUNet_preprocessed").glob("federated/*/*/splits_final.json"))
    dice = []
    for case in json.loads(splits.read_text())[0]["val"]:
        image, properties = SimpleITKIO().read_images([str(raw / "imagesTr" / f"{case}_0000.nii.gz")])
        truth, _ = SimpleITKIO().read_seg(str(raw / "labelsTr" / f"{case}.nii.gz"))
        found = predictor.predict_single_npy_array(image, properties)
        for label in (1, 2, 3):
            a, b = truth[0] == label, found == label
            dice.append(2 * (a & b).sum() / (a.sum() + b.sum()))
    # A voxel may tip over: the two predictions need not use equally many threads, and the network has hardly learnt.
    assert history.cross_site["site-1"]["site-2"].dsc == pytest.approx(np.mean(dice), abs=1e-3)


def test_a_site_refuses_a_job_that_asks_for_what_its_settings_keep(mixed: Path, tmp_path: Path, inline: None):
    settings_of("site-2", tmp_path, keep_local=["norm"])
    federation = Loopback(tmp_path, SITES[:2])
    training = MIXED | {"num_rounds": 1}
    federation.run("asking", training, kind=AsymFedAvgController)
    assert "site-2: keep_local: expected a job that leaves norm at this site" in federation.panics[0]
    (reply,) = [reply for site, task, _, reply in federation.sent if (site, task) == ("site-2", TRAIN)]
    assert "error" in json.loads(fobs.loads(reply)["DXO"]["data"]["nnunet_flare"])
    federation.run("leaving", training, sharing={"keep_local": ["norm"]}, kind=AsymFedAvgController)
    assert federation.panics == []


@pytest.mark.parametrize(
    "change",
    [
        {"num_cases": float("inf")},
        {"dice": {"RV": 10.0**300}},
        {"dice": {"RV": -0.1}},
        {"dice": {"\x1b[31mRV": 0.5}},
        {"train_loss": float("inf")},
    ],
)
def test_a_site_that_reports_what_cannot_be_is_left_out_of_the_round(mixed: Path, tmp_path: Path, inline: None, change):
    def lie(site, task, reply):
        if task == TRAIN and site == "site-2":
            dxo = from_shareable(reply)
            dxo.meta["nnunet_flare"] = json.dumps(json.loads(dxo.meta["nnunet_flare"]) | change)
            return dxo.to_shareable()
        return reply

    federation = Loopback(tmp_path, SITES[:2], lie)
    federation.run("lies", MIXED | {"num_rounds": 1, "stop_after": None}, kind=AsymFedAvgController)
    assert re.search("updates in round 1: expected at least 2.*site-2: reply: expected", federation.panics[0])


def test_fewer_sites_than_a_group_needs_are_no_federation(mixed: Path, tmp_path: Path, inline: None):
    federation = Loopback(tmp_path, SITES[:1])
    federation.run("alone", MIXED, federation={"min_sites": 1}, kind=AsymFedAvgController)
    assert "sites that train: expected at least 2, found 1" in federation.panics[0]
