"""What a site's, or the server's, nnU-Net process can be asked to do."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.aggregation.network import network_to_json
from nnunet_flare.errors import ConfigError
from nnunet_flare.fingerprint.summary import FingerprintSummary
from nnunet_flare.nnunet import model
from nnunet_flare.nnunet.config import TrainingConfig
from nnunet_flare.nnunet.cross_site import score_foreign_model
from nnunet_flare.nnunet.dataset import RawDataset, find_dataset
from nnunet_flare.nnunet.evaluate import CaseMetrics, validate
from nnunet_flare.nnunet.extract import extract_summary
from nnunet_flare.nnunet.network_plan import architecture_plans
from nnunet_flare.nnunet.plans import plan
from nnunet_flare.nnunet.preprocess import preprocess
from nnunet_flare.nnunet.site import SiteSettings
from nnunet_flare.nnunet.training import SiteTraining
from nnunet_flare.storage import read_json, write_atomically, write_json

__all__ = ["Commands"]

Layers = Mapping[str, np.ndarray]
Progress = Callable[[str, int, int], None]


class Commands:
    """Commands of the nnU-Net process. Arguments and answers are JSON values; layers travel beside them.

    Args:
        progress: Told what is being done, how much of it, and of how much.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._training: SiteTraining | None = None

    def _report(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self._progress(what, done, total)

    def extract(self, settings: dict[str, Any], num_foreground_voxels: int, num_cases_total: int) -> dict[str, Any]:
        """The site's fingerprint summary."""
        site = SiteSettings.from_json(settings)
        summary = extract_summary(
            find_dataset(site.raw_root, site.dataset),
            num_foreground_voxels=num_foreground_voxels,
            num_cases_total=num_cases_total,
            num_processes=site.num_processes,
            report=self._report("fingerprint"),
        )
        return {"summary": summary.to_json()}

    def plan(self, settings: dict[str, Any], job: dict[str, Any], run: str, summary: dict[str, Any]) -> dict[str, Any]:
        """Plan with nnU-Net's planner from a (merged) fingerprint; the plans are kept in the run folder."""
        site, config = SiteSettings.from_json(settings), TrainingConfig.from_json(job)
        fingerprint = FingerprintSummary.from_json(summary)
        dataset = find_dataset(site.raw_root, site.dataset)
        plans = plan(
            dataset,
            fingerprint,
            num_training=fingerprint.num_training,
            planner=config.planner,
            gpu_memory_gb=site.gpu_memory_gb,
            configuration=config.configuration,
            overrides={**config.plans_overrides, **site.plans_overrides},
        )
        folder = Path(run)
        write_json(folder / "dataset_fingerprint.json", fingerprint.to_nnunet())
        write_json(folder / "plans.json", plans)
        return {"plans": plans}

    def plan_locally(self, settings: dict[str, Any], job: dict[str, Any], run: str) -> dict[str, Any]:
        """Plan from the site's own fingerprint; of the plans, only the network's architecture is told."""
        site, config = SiteSettings.from_json(settings), TrainingConfig.from_json(job)
        record = Path(run) / "fingerprint_summary.json"
        if not record.exists():
            number = RawDataset.read(find_dataset(site.raw_root, site.dataset)).schema.num_training
            write_json(record, self.extract(settings, config.num_foreground_voxels, number)["summary"])
        plans = self.plan(settings, job, run, read_json(record))["plans"]
        return {"plans": architecture_plans(plans, config.configuration)}

    def prepare(self, settings: dict[str, Any], job: dict[str, Any], run: str, alignment: str) -> dict[str, Any]:
        """Preprocess, then open the training: what its layers are, and the cases of its fold."""
        training = self._open(settings, job, run, alignment)
        return {
            "signature": network_to_json(training.network()),
            "num_training_cases": training.num_training_cases,
        }

    def _preprocess(self, site: SiteSettings, config: TrainingConfig, run: Path) -> Path:
        return preprocess(
            find_dataset(site.raw_root, site.dataset),
            read_json(run / "plans.json"),
            read_json(run / "dataset_fingerprint.json"),
            config.configuration,
            preprocessed_root=site.preprocessed_root,
            num_processes=site.num_processes,
            report=self._report("preprocessing"),
        )

    def _open(self, settings: dict[str, Any], job: dict[str, Any], run: str, alignment: str) -> SiteTraining:
        key = json.dumps([settings, job, run, alignment], sort_keys=True)
        if self._training is None or self._training.key != key:
            site, config, folder = SiteSettings.from_json(settings), TrainingConfig.from_json(job), Path(run)
            preprocessed = self._preprocess(site, config, folder)
            self._training = SiteTraining(key, site, config, alignment, folder, preprocessed)
        return self._training

    def train(
        self, settings: dict[str, Any], job: dict[str, Any], run: str, alignment: str, round_number: int, layers: Layers
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """One round of local training from the layers received; what changed in them goes back."""
        training = self._open(settings, job, run, alignment)
        score, loss = training.train(round_number, layers, self._report(f"training round {round_number + 1}"))
        local = training.stepper.layers()
        difference, wire = training.config.update == "difference", np.dtype(training.config.wire_dtype)
        update = {
            name: (local[name] - received.astype(np.float32) if difference else local[name]).astype(wire, copy=False)
            for name, received in layers.items()
        }
        return training.describe(score) | {"train_loss": loss}, update

    def evaluate(
        self, settings: dict[str, Any], job: dict[str, Any], run: str, alignment: str, round_number: int, layers: Layers
    ) -> dict[str, Any]:
        """The online score of the layers received; nothing is trained."""
        training = self._open(settings, job, run, alignment)
        training.receive(layers)
        training.stepper.begin_round(round_number, reset_momentum=False)
        return training.describe(training.stepper.evaluate())

    def validate(
        self, settings: dict[str, Any], job: dict[str, Any], run: str, alignment: str, layers: Layers
    ) -> dict[str, Any]:
        """Keep the final layers as nnU-Net's final checkpoint, and score them on every validation case.

        With ``finetune_epochs`` the site's model is personalised first: ``cases`` are then the scores of the model that
        the site keeps, and ``cases_before`` those of the final layers as they came.
        """
        training = self._open(settings, job, run, alignment)
        training.resume(training.config.num_rounds)
        training.receive(layers)
        training.stepper.begin_round(training.config.num_rounds, reset_momentum=False)
        answer = {}
        if training.finetune_epochs:
            answer["cases_before"] = self._score(training, "validation_before_finetuning")
            training.finetune(self._report("fine-tuning"))
        training.stepper.finish()
        answer["cases"] = self._score(training, "validation")
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in training.environment.items()]
        write_atomically(Path(run) / "nnunet.env", lambda temporary: temporary.write_text("".join(lines)))
        return answer

    def _score(self, training: SiteTraining, subfolder: str) -> list[CaseMetrics]:
        return validate(
            training.stepper.trainer,
            subfolder=subfolder,
            nsd_tolerance_mm=training.config.nsd_tolerance_mm,
            progress=self._report(subfolder.replace("_", " ")),
        )

    def final_model(
        self, settings: dict[str, Any], job: dict[str, Any], run: str, alignment: str
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The whole final model, for the federation's other sites to score; the site's settings decide whether."""
        site = SiteSettings.from_json(settings)
        if not site.share_model:
            raise ConfigError(
                field="share_model",
                expected="true, for cross-site scores of this site's model",
                found="false",
                remedy="allow it in the site's settings, or do without this row of the table",
            )
        plans, layers = self._open(settings, job, run, alignment).final_model()
        return {"plans": plans}, layers

    def score_model(
        self,
        settings: dict[str, Any],
        job: dict[str, Any],
        run: str,
        alignment: str,
        plans: dict[str, Any],
        dataset_json: dict[str, Any],
        layers: Layers,
    ) -> dict[str, Any]:
        """Scores of another site's model on this site's validation cases."""
        training, site = self._open(settings, job, run, alignment), SiteSettings.from_json(settings)
        cases = score_foreign_model(
            training.config,
            plans,
            dataset_json,
            layers,
            dataset=RawDataset.read(find_dataset(site.raw_root, site.dataset)),
            cases=training.validation_cases,
            reader=training.stepper.trainer.plans_manager.image_reader_writer_class(),
            device=training.device,
            progress=self._report("cross-site validation"),
        )
        return {"cases": cases}

    def initial_layers(
        self,
        job: dict[str, Any],
        alignment: str,
        plans: dict[str, Any],
        dataset_json: dict[str, Any],
        pretrained: str | None,
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Server: the initial weights of a network, decided by the job's seed or by a pretrained checkpoint."""
        config, file = TrainingConfig.from_json(job), Path(pretrained) if pretrained else None
        return {}, model.initial_layers(config, alignment, plans, dataset_json, file)

    def export_model(
        self,
        job: dict[str, Any],
        plans: dict[str, Any],
        dataset_json: dict[str, Any],
        fingerprint: dict[str, Any],
        folder: str,
        layers: Layers,
    ) -> dict[str, Any]:
        """Server: write the global model as a folder that ``nnUNetv2_predict_from_modelfolder`` loads."""
        model.export(TrainingConfig.from_json(job), plans, dataset_json, fingerprint, layers, Path(folder))
        return {}
