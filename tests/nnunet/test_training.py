"""One site's rounds and final validation in its nnU-Net process, with nnU-Net itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import TINY_TRAINING
from nnunet_flare.nnunet.config import TrainingConfig
from nnunet_flare.nnunet.process import NNUNetProcess
from nnunet_flare.nnunet.site import SiteSettings

FOLD = "nnUNet_results/Dataset900_Demo/nnUNetTrainer__nnUNetPlans__2d/fold_0"
TRAINING = {"num_rounds": 1, "prox_mu": 0.1, "freeze": [r"^encoder\.stages\.0\."], "finetune_epochs": 2}


class Site:
    """A site's nnU-Net process, and what every command is told."""

    def __init__(self, home: Path, **changes) -> None:
        settings = SiteSettings.load("site-1", home / "local").with_dataset("Dataset900_Demo")
        self.run = home / "run"
        self.process = NNUNetProcess(log_file=home / "nnunet.log", num_threads=1)
        self.settings = {"settings": settings.to_json() | changes}
        self.training = self.settings | {"job": TrainingConfig(**TINY_TRAINING | TRAINING).to_json()}

    def ask(self, command: str, layers=None, **arguments):
        named = {} if command == "plan" else {"alignment": "name"}
        return self.process.call(command, self.training | {"run": str(self.run)} | named | arguments, layers)

    def prepare(self) -> dict[str, np.ndarray]:
        """Plan and preprocess; returns common layers to start from."""
        summary, _ = self.process.call(
            "extract", self.settings | {"num_foreground_voxels": 10_000, "num_cases_total": 5}
        )
        self.ask("plan", summary=summary["summary"])
        signature = self.ask("prepare")[0]["signature"]
        generator = np.random.default_rng(0)
        return {name: generator.normal(0, 0.1, shape).astype(np.float32) for name, shape, _, _ in signature}

    def final_checkpoint(self) -> dict:
        return torch.load(self.run / FOLD / "checkpoint_final.pth", weights_only=False)


@pytest.fixture
def site(demo_home: Path):
    site = Site(demo_home)
    yield site
    site.process.close()


def assert_equal_weights(first: dict, second: dict) -> None:
    for name, tensor in first["network_weights"].items():
        assert torch.equal(tensor, second["network_weights"][name]), name


@pytest.mark.slow
def test_a_site_freezes_personalises_and_repeats_it_to_the_bit(site, demo_home):
    layers = site.prepare()
    _, update = site.ask("train", layers, round_number=0)
    unchanged = {name for name, difference in update.items() if not difference.any()}
    untrained = ("encoder.stages.0.", "decoder.seg_layers.0.")  # nnU-Net's loss ignores the lowest output
    assert unchanged == {name for name in layers if name.startswith(untrained)}

    final = {name: layer + update[name] for name, layer in layers.items()}
    answer, _ = site.ask("validate", final)
    first = site.final_checkpoint()
    assert first["current_epoch"] == 3
    assert {len(values) for values in first["logging"].values()} == {3}
    weights = first["network_weights"]
    same = {name for name in final if np.array_equal(final[name], weights[name].numpy())}
    assert unchanged <= same
    assert not [name for name in same - unchanged if name.endswith(".weight")]  # a bias before a norm hardly moves
    for subfolder in ("validation", "validation_before_finetuning"):
        assert (site.run / FOLD / subfolder / "summary.json").exists()

    assert site.ask("validate", final)[0] == answer
    assert_equal_weights(first, site.final_checkpoint())
    site.process.close()  # and from the checkpoint of the last round
    assert site.ask("validate", final)[0] == answer
    assert_equal_weights(first, site.final_checkpoint())

    watcher = Site(demo_home, role="evaluate")
    only_scored, _ = watcher.ask("validate", final)
    watcher.process.close()
    assert only_scored == {"cases": answer["cases_before"]}

    site.training["job"]["prox_mu"] = 0.0
    _, unpulled = site.ask("train", layers, round_number=0)
    assert any(not np.array_equal(difference, unpulled[name]) for name, difference in update.items())
