"""One site's training between rounds: its environment, its checkpoints, and where to go on after a crash."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_flare.aggregation.network import Layer
from nnunet_flare.aggregation.sharing import SharingConfig
from nnunet_flare.errors import ConfigError
from nnunet_flare.nnunet.config import TrainingConfig
from nnunet_flare.nnunet.evaluate import foreground_labels
from nnunet_flare.nnunet.local_objective import proximal_term
from nnunet_flare.nnunet.model import load_pretrained, read_weights
from nnunet_flare.nnunet.preprocess import fold_cases
from nnunet_flare.nnunet.site import SiteSettings
from nnunet_flare.nnunet.stepper import RoundSchedule, Score, TrainerStepper, find_trainer
from nnunet_flare.nnunet.weights import canonical_tensors
from nnunet_flare.storage import read_json

__all__ = ["SiteTraining"]

Layers = Mapping[str, np.ndarray]

_CHECKPOINT = re.compile(r"round_(\d+)\.pt")
_KEPT_CHECKPOINTS = 2
_PERSONAL = -1  # in place of the last round's number: no checkpoint is of that state, so ``resume`` starts over


class SiteTraining:
    """The open training of one site, and its checkpoints: ``<run>/checkpoints/fold_0/round_00007.pt`` is its
    state after round 7 (counted from 0). The last two are kept."""

    def __init__(
        self, key: str, site: SiteSettings, config: TrainingConfig, alignment: str, run: Path, preprocessed: Path
    ) -> None:
        self.key, self.config, self._alignment = key, config, alignment
        self._site, self._checkpoints = site, run / "checkpoints" / f"fold_{config.fold}"
        self.environment = {
            "nnUNet_raw": str(site.raw_root),
            "nnUNet_preprocessed": str(preprocessed),
            "nnUNet_results": str(run / "nnUNet_results"),
        }
        os.environ.update(self.environment)
        self.device = choose_device(site)
        if site.num_augmentation_processes is not None or self.device.type != "cuda":
            os.environ["nnUNet_n_proc_DA"] = str(site.num_augmentation_processes or 0)
        self._plans = read_json(run / "plans.json")
        folder = preprocessed / self._plans["dataset_name"]
        self._dataset_json = read_json(folder / "dataset.json")
        identifier = self._plans["configurations"][config.configuration]["data_identifier"]
        training_cases, self.validation_cases = fold_cases(folder, identifier, config.fold)
        self.num_training_cases = len(training_cases)
        self._restart()

    def _restart(self) -> None:
        config = self.config
        self.stepper = TrainerStepper(
            find_trainer(config.trainer),
            plans=self._plans,
            dataset_json=self._dataset_json,
            configuration=config.configuration,
            fold=config.fold,
            device=self.device,
            schedule=RoundSchedule(
                num_rounds=config.num_rounds,
                epochs_per_round=config.epochs_per_round,
                iterations_per_epoch=config.iterations_per_epoch,
                val_iterations_per_epoch=config.val_iterations_per_epoch,
            ),
            seed_parts=(config.seed, self._site.site),
            alignment=self._alignment,
            freeze=config.freeze,
        )
        if self._site.pretrained and not self._saved_rounds():
            file, site = self._site.pretrained, self._site.site
            load_pretrained(self.stepper.network, file, alignment=self._alignment, whole=False, site=site)
        self._last_round: int | None = None

    def resume(self, round_number: int) -> None:
        """Bring momentum and logs to their state before ``round_number``."""
        earlier = {number: file for number, file in self._saved_rounds().items() if number < round_number}
        latest = max(earlier, default=None)
        if latest != self._last_round:
            self._restart()
            if latest is not None:
                self.stepper.restore(earlier[latest])
                self._last_round = latest

    def _saved_rounds(self) -> dict[int, Path]:
        files = self._checkpoints.glob("round_*.pt")
        return {int(match[1]): file for file in files if (match := _CHECKPOINT.fullmatch(file.name))}

    def receive(self, layers: Layers) -> None:
        """Take in layers that a round begins with.

        Raises:
            ConfigError: among them are some that this site's settings keep here.
        """
        if self._site.keep_local:
            kept = SharingConfig(keep_local=self._site.keep_local).local_layers({self._site.site: self.network()})
            if wanted := sorted(kept & layers.keys()):
                raise ConfigError(
                    field="keep_local",
                    expected=f"a job that leaves {', '.join(self._site.keep_local)} at this site, as its settings say",
                    found=f"a request for {len(wanted)} such layers, {wanted[0]} among them",
                    remedy="add keep_local to the job, or take it from the site's settings",
                    site=self._site.site,
                )
        self.stepper.load_layers(layers)

    def train(self, round_number: int, layers: Layers, progress: Callable[[int, int], None]) -> tuple[Score, float]:
        self.resume(round_number)
        self.receive(layers)
        if round_number and self._last_round is None:
            own = self.network().keys() - layers.keys()
            print(f"no checkpoint of an earlier round here: fresh momentum, and {len(own)} local layers start anew")
        self.stepper.begin_round(round_number, reset_momentum=self.config.momentum == "reset")
        with proximal_term(self.stepper.network, layers, mu=self.config.prox_mu, alignment=self._alignment):
            result = self.stepper.train_round(progress)
        self.stepper.save(self._checkpoints / f"round_{round_number:05d}.pt")
        self._last_round = round_number
        saved = self._saved_rounds()
        kept = sorted(number for number in saved if number <= round_number)[-_KEPT_CHECKPOINTS:]
        for number in saved.keys() - set(kept):
            saved[number].unlink()
        return result

    def network(self) -> dict[str, Layer]:
        """Canonical name -> what the layer is, with the site's own channels and labels."""
        channels = self._dataset_json["channel_names"]
        outputs = list(foreground_labels(self._dataset_json))
        if not self.stepper.trainer.label_manager.has_regions:
            outputs = ["background", *outputs]
        return self.stepper.describe(channels=[channels[index] for index in sorted(channels, key=int)], outputs=outputs)

    @property
    def finetune_epochs(self) -> int:
        """Epochs of this site after the last round; a site that only evaluates trains none."""
        return self.config.finetune_epochs if self._site.role == "train" else 0

    def finetune(self, progress: Callable[[int, int], None]) -> None:
        """Personalise the final layers, which must be loaded. No state of it is kept: a repeat starts over."""
        self._last_round = _PERSONAL
        self.stepper.begin_round(self.config.num_rounds, reset_momentum=self.config.momentum == "reset")
        self.stepper.finetune(self.finetune_epochs, progress)

    def final_model(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Plans, and all layers of ``checkpoint_final.pth`` by nnU-Net's names."""
        weights = read_weights(Path(self.stepper.trainer.output_folder) / "checkpoint_final.pth")
        names = canonical_tensors(self.stepper.network)
        return dict(self._plans), {name: weights[name].float().numpy() for name in names}

    def describe(self, score: Score) -> dict[str, Any]:
        names = foreground_labels(self._dataset_json)
        return {
            "dice": dict(zip(names, score.dice, strict=True)),
            "num_cases": self.num_training_cases,
        }


def choose_device(site: SiteSettings) -> torch.device:
    """The site's device; ``auto`` is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: the site asks for a device that torch does not find.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = site.device if site.device != "auto" else ("cuda" if available["cuda"] else "cpu")
    if not available[name]:
        raise ConfigError(
            field="device",
            expected=f"one of {', '.join(kind for kind, here in available.items() if here)}",
            found=name,
            remedy="correct the site's settings, or install a torch build for the device",
            site=site.site,
        )
    if name == "cuda":
        torch.backends.cudnn.benchmark = True
    return torch.device(name)
