"""Asymmetric federated averaging in one process (``loopback``): unlike networks, shared in part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from nvflare.apis.dxo import from_shareable
from nvflare.fuel.utils import fobs

from conftest import TINY_TRAINING
from loopback import Loopback
from nnunet_flare.aggregation.sharing import Sharing
from nnunet_flare.flare.asym import AsymFedAvgController
from nnunet_flare.flare.history import RunHistory
from nnunet_flare.flare.protocol import TRAIN
from nnunet_flare.storage import read_json

SITES = ("site-1", "site-2", "site-3")
MIXED = TINY_TRAINING | {"dataset": "Dataset902_DemoMixed"}


@pytest.fixture(scope="session")
def mixed_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw data root for each of three sites that plan unlike networks."""
    from nnunet_flare.nnunet.phantoms import write_demo_dataset

    root = tmp_path_factory.mktemp("mixed_data")
    for site in SITES:
        write_demo_dataset(root / site, site, dataset="demo_mixed", num_cases=5)
    return root


@pytest.fixture
def mixed(home: Path, mixed_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home in which the raw data of the sites lies ready."""
    for site in SITES:
        (home / site).mkdir(parents=True)
        (home / site / "nnUNet_raw").symlink_to(mixed_data / site)
    return home


def run_of(home: Path, run: str) -> Path:
    return home / "server" / "runs" / run


def model_of(home: Path, site: str, run: str) -> Path:
    results = home / site / "runs" / run / "nnUNet_results" / "Dataset902_DemoMixed"
    return results / "nnUNetTrainer__nnUNetPlans__2d"


def test_unlike_networks_train_together_and_only_shared_layers_travel(mixed: Path, tmp_path: Path):
    federation = Loopback(tmp_path, SITES)
    federation.run("asym", MIXED | {"num_rounds": 2}, kind=AsymFedAvgController)
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
        for sender, task, request, reply in federation.sent:
            if sender == site and task == TRAIN:
                for message in (request, reply):
                    assert set(from_shareable(fobs.loads(message)).data) == shared
        assert (model_of(mixed, site, "asym") / "fold_0" / "checkpoint_final.pth").exists()


def test_a_layer_that_is_not_shared_is_nowhere_in_what_left_the_site(mixed: Path, tmp_path: Path):
    federation = Loopback(tmp_path, SITES)
    training = MIXED | {"num_rounds": 2, "update": "weights"}  # the last update then holds what is in the final model
    federation.run("asym", training, sharing={"alignment": "name"}, kind=AsymFedAvgController)
    assert federation.panics == []
    sharing = Sharing.from_json(read_json(run_of(mixed, "asym") / "sharing.json"))
    for site in SITES:
        file = model_of(mixed, site, "asym") / "fold_0" / "checkpoint_final.pth"
        weights = torch.load(file, map_location="cpu", weights_only=False)["network_weights"]
        kept = sharing.networks[site].keys() - sharing.names_of(site)
        assert kept
        left = b"".join(reply for sender, _, _, reply in federation.sent if sender == site)
        for name in kept:
            assert weights[name].numpy().tobytes()[:256] not in left
            assert name.encode() not in b"".join(
                reply for sender, task, _, reply in federation.sent if sender == site and task == TRAIN
            )
