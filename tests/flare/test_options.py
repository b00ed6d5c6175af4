"""What nnU-Net users choose, in federated jobs at small scale: planners, memory, pretrained weights, folds."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import TINY_TRAINING, settings_of
from loopback import Loopback
from nnunet_flare.aggregation.sharing import Sharing
from nnunet_flare.flare.asym import AsymFedAvgController
from nnunet_flare.flare.ffe import FFEController
from nnunet_flare.flare.history import RunHistory
from nnunet_flare.flare.protocol import TRAIN
from nnunet_flare.flare.run import RunFolder
from nnunet_flare.report.status import status_text
from nnunet_flare.storage import read_json

SITES = ("site-1", "site-2")
MIXED = TINY_TRAINING | {"dataset": "Dataset902_DemoMixed", "num_rounds": 1}
ONE_ROUND = TINY_TRAINING | {"num_rounds": 1}

pytestmark = pytest.mark.usefixtures("inline")


def results_of(home: Path, site: str, run: str) -> Path:
    return home / site / "runs" / run / "nnUNet_results"


@pytest.mark.parametrize("controller", [FFEController, AsymFedAvgController])
def test_a_residual_encoder_preset_trains(controller, demo_home: Path, tmp_path: Path):
    federation = Loopback(tmp_path, SITES)
    training = ONE_ROUND | {"planner": "nnUNetPlannerResEncM", "iterations_per_epoch": 1}
    federation.run("resenc", training, kind=controller)
    assert federation.panics == []
    networks = Sharing.from_json(read_json(demo_home / "server" / "runs" / "resenc" / "sharing.json")).networks
    assert any(".blocks." in name for name in networks["site-2"])
    model = results_of(demo_home, "site-2", "resenc") / "Dataset900_Demo"
    assert (model / "nnUNetTrainer__nnUNetResEncUNetMPlans__2d" / "fold_0" / "checkpoint_final.pth").exists()


def test_a_site_plans_for_its_own_memory(mixed: Path, tmp_path: Path):
    settings_of("site-1", tmp_path, gpu_memory_gb=0.02)
    federation = Loopback(tmp_path, ("site-1", "site-2", "site-3"))
    training = MIXED | {"configuration": "3d_fullres", "stop_after": "plan"}
    federation.run("memory", training, kind=AsymFedAvgController)
    assert federation.panics == []
    small = read_json(mixed / "site-1" / "runs" / "memory" / "plans.json")
    settings_of("site-1", tmp_path)
    federation.run("more", training, kind=AsymFedAvgController)
    large = read_json(mixed / "site-1" / "runs" / "more" / "plans.json")
    small, large = (plans["configurations"]["3d_fullres"] for plans in (small, large))
    assert small["patch_size"] < large["patch_size"]
    assert small["architecture"]["arch_kwargs"]["n_stages"] < large["architecture"]["arch_kwargs"]["n_stages"]


def test_several_folds_are_trained_in_turn_on_one_preprocessing(demo_home: Path, tmp_path: Path):
    second_fold_fails = []

    def until_fold_1(site, task, reply):
        trained = sum(sent[1] == TRAIN for sent in federation.sent)
        return None if task == TRAIN and trained > 2 and second_fold_fails.append(site) is None else reply

    federation = Loopback(tmp_path, SITES, until_fold_1)
    training = ONE_ROUND | {"fold": [0, 1]}
    federation.run("folds", training)
    assert "updates in round 1" in federation.panics[0]
    folder = demo_home / "server" / "runs" / "folds"
    assert RunHistory.load(folder / "fold_0").phase == "done"

    federation.tamper = lambda site, task, reply: reply
    federation.run("folds", training)
    assert federation.panics == []
    assert sum(sent[1] == TRAIN for sent in federation.sent) == 2 + 2 + 2  # fold 0 was not repeated
    for fold in ("fold_0", "fold_1"):
        history = RunHistory.load(folder / fold)
        assert history.phase == "done"
        assert set(history.final) == set(SITES)
        for artifact in set(history.artifacts) - {"tensorboard"}:
            assert (folder / fold / history.artifacts[artifact]).exists()
        assert (folder / "model" / fold / "checkpoint_final.pth").exists()
        model = results_of(demo_home, "site-1", "folds") / "Dataset900_Demo" / "nnUNetTrainer__nnUNetPlans__2d"
        assert (model / fold / "checkpoint_final.pth").exists()
    assert len(list((demo_home / "site-1" / "nnUNet_preprocessed" / "federated").iterdir())) == 1
    text = status_text(folder)
    assert "folds, fold 0" in text
    assert "folds, fold 1" in text


def test_unlike_networks_start_from_pretrained_layers_of_server_and_site(mixed: Path, tmp_path: Path, capfd):
    federation = Loopback(tmp_path, SITES)
    by_name = {"alignment": "name"}
    federation.run("first", MIXED, sharing=by_name, kind=AsymFedAvgController)
    file = results_of(mixed, "site-1", "first") / "Dataset902_DemoMixed" / "nnUNetTrainer__nnUNetPlans__2d" / "fold_0"
    (mixed / "pretrained").mkdir()
    (mixed / "pretrained" / "heart.pth").write_bytes((file / "checkpoint_final.pth").read_bytes())
    settings_of("site-1", tmp_path, pretrained=str(mixed / "pretrained" / "heart.pth"))
    capfd.readouterr()
    training = MIXED | {"pretrained": "heart.pth", "stop_after": "preprocess", "seed": 5}
    federation.run("second", training, sharing=by_name, kind=AsymFedAvgController)
    assert federation.panics == []
    runs = mixed / "server" / "runs"
    first, second = (RunFolder(mixed / "server", name) for name in ("first", "second"))
    (_, before), (_, start) = first.load_global(), second.load_global()
    shared = Sharing.from_json(read_json(runs / "second" / "sharing.json")).names_of("site-2")
    body = [name for name in shared if "seg_layers" not in name]
    assert body
    for name in body:
        assert (start[name] == before[name]).all()
    told = capfd.readouterr().out
    assert told.count("pretrained heart.pth: ") == 2  # the server's shared layers, and all of site-1's


def test_a_fine_tuned_model_is_scored_beside_the_averaged_one(demo_home: Path, tmp_path: Path):
    federation = Loopback(tmp_path, SITES)
    federation.run("tuned", ONE_ROUND | {"finetune_epochs": 1, "prox_mu": 0.1, "freeze": ["^encoder.stages.0"]})
    assert federation.panics == []
    history = RunHistory.load(demo_home / "server" / "runs" / "tuned")
    assert set(history.final) == set(history.final_before_finetuning) == set(SITES)
    assert "after fine-tuning" in status_text(demo_home / "server" / "runs" / "tuned")
