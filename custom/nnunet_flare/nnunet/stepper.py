"""Drives an unmodified ``nnUNetTrainer`` round by round instead of to its end."""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_flare.aggregation.network import Layer
from nnunet_flare.errors import ConfigError, StateError
from nnunet_flare.nnunet.local_objective import freeze_layers
from nnunet_flare.nnunet.weights import canonical_tensors, describe_network, read_layers, write_layers
from nnunet_flare.storage import write_atomically

__all__ = ["RoundSchedule", "Score", "TrainerStepper", "find_trainer", "seed_everything", "write_checkpoint"]

Progress = Callable[[int, int], None]

FINETUNE_RATE = 0.01
"""Learning rate after the last round, as a part of the trainer's initial one: what nnU-Net's schedule, which has then
ended at 0, has in the last 0.6 % of its epochs."""


@dataclass(frozen=True, kw_only=True)
class RoundSchedule:
    """How a training is cut into rounds; nnU-Net's learning rate falls over all epochs of all rounds."""

    num_rounds: int
    epochs_per_round: int = 1
    iterations_per_epoch: int | None = None
    val_iterations_per_epoch: int | None = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """nnU-Net's online score on random validation patches: Dice per foreground label or region, and the loss."""

    dice: tuple[float, ...]
    loss: float


def find_trainer(name: str) -> type[nnUNetTrainer]:
    """A trainer class by nnU-Net's own lookup (its package, then ``nnUNet_extTrainer``)."""
    with contextlib.suppress(RuntimeError):  # nnU-Net's answer for an unknown name, in some versions
        if trainer := recursive_find_trainer_class_by_name(name):
            return trainer
    raise ConfigError(
        field="trainer",
        expected="a trainer class that nnU-Net finds",
        found=name,
        remedy="correct the name, or point nnUNet_extTrainer at the folder that holds the class at every site",
    )


def seed_everything(*parts: object) -> None:
    """Seed Python, NumPy and torch from a hash of ``parts``."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    random.seed(digest)
    np.random.seed(int.from_bytes(digest[:4], "big"))
    torch.manual_seed(int.from_bytes(digest[4:12], "big"))


class TrainerStepper:
    """One site's training: any ``nnUNetTrainer`` subclass, round by round, resumable at every round.

    Every round begins with fresh seeds and a learning rate that depend on nothing but the run, the site and the
    round, so that a round can be repeated after a crash and a site can miss rounds. On CPU without augmentation
    workers a repeated round is bitwise the same.

    Args:
        trainer_class: Found with ``find_trainer``.
        plans: nnU-Net plans. The environment variables nnUNet_preprocessed and nnUNet_results must be set.
        device: torch device.
        seed_parts: What the seeds of a round are made from, besides the round.
        alignment: How layers that come and go are named (``weights.canonical_tensors``).
        freeze: Patterns of the names of layers that stay fixed (``freeze_layers``).
    """

    def __init__(
        self,
        trainer_class: type[nnUNetTrainer],
        *,
        plans: Mapping[str, Any],
        dataset_json: Mapping[str, Any],
        configuration: str,
        fold: int | str,
        device: torch.device,
        schedule: RoundSchedule,
        seed_parts: tuple[object, ...] = (),
        alignment: str = "name",
        freeze: Sequence[str] = (),
    ) -> None:
        if trainer_class.load_checkpoint is not nnUNetTrainer.load_checkpoint:
            raise ConfigError(
                field="trainer",
                expected="a trainer whose learning rate follows from the epoch alone",
                found=f"{trainer_class.__name__}, which repairs its own state in load_checkpoint",
                remedy="choose a trainer without a warm-up of its own: rounds could not be repeated or missed",
            )
        self.schedule = schedule
        self._seed_parts, self._alignment, self._freeze = seed_parts, alignment, freeze
        self.trainer = trainer_class(
            plans={**plans, "continue_training": False},
            configuration=configuration,
            fold=fold,
            dataset_json=dict(dataset_json),
            device=device,
        )
        trainer = self.trainer
        trainer.num_epochs = schedule.num_rounds * schedule.epochs_per_round
        if schedule.iterations_per_epoch is not None:
            trainer.num_iterations_per_epoch = schedule.iterations_per_epoch
        if schedule.val_iterations_per_epoch is not None:
            trainer.num_val_iterations_per_epoch = schedule.val_iterations_per_epoch
        trainer.save_every = trainer.num_epochs + 1  # rounds are checkpointed by ``save``
        trainer._best_ema = math.inf  # ``checkpoint_best`` would score patches after local training
        trainer.logger.plot_progress_png = lambda output_folder: None  # half a second an epoch
        self._started = False

    @property
    def network(self) -> torch.nn.Module:
        self._initialize()
        return self.trainer.network

    def _initialize(self) -> None:
        if not self.trainer.was_initialized:
            seed_everything(*self._seed_parts, "initialize")
            self.trainer.initialize()
            freeze_layers(self.trainer.network, self._freeze, alignment=self._alignment)

    def describe(self, *, channels: Sequence[str], outputs: Sequence[str]) -> dict[str, Layer]:
        """Canonical name -> what the layer is (``weights.describe_network``)."""
        return describe_network(self.network, alignment=self._alignment, channels=channels, outputs=outputs)

    def layers(self) -> dict[str, np.ndarray]:
        return read_layers(self.network, alignment=self._alignment)

    def load_layers(self, layers: Mapping[str, np.ndarray]) -> None:
        write_layers(self.network, layers, alignment=self._alignment)

    def begin_round(self, round_number: int, *, reset_momentum: bool) -> None:
        """Set learning rate position, logs and seeds for a round; the first one also starts the data loaders."""
        self._initialize()
        trainer = self.trainer
        if not self._started:
            seed_everything(*self._seed_parts, round_number, "start")  # augmentation workers fork with this state
            trainer.on_train_start()
            _make_augmentation_reproducible(trainer)
            self._started = True
        if reset_momentum:
            trainer.optimizer.state.clear()
        trainer.current_epoch = round_number * self.schedule.epochs_per_round
        _align_logs(trainer.logger.local_logger.my_fantastic_logging, trainer.current_epoch)
        seed_everything(*self._seed_parts, round_number)

    def evaluate(self) -> Score:
        """nnU-Net's validation pass over random patches with the weights as they are; nothing is trained."""
        trainer = self.trainer
        with torch.no_grad():
            trainer.on_validation_epoch_start()
            outputs = [
                trainer.validation_step(next(trainer.dataloader_val))
                for _ in range(trainer.num_val_iterations_per_epoch)
            ]
            trainer.on_validation_epoch_end(outputs)
        logs = trainer.logger.local_logger.my_fantastic_logging
        dice = tuple(float(value) for value in logs["dice_per_class_or_region"][-1])
        return Score(dice=dice, loss=float(logs["val_losses"][-1]))

    def train_round(self, progress: Progress = lambda done, total: None) -> tuple[Score, float]:
        """Train the epochs of one round.

        Each epoch first scores the weights it starts from, so the first score is that of the aggregated model and
        the number of validation passes is nnU-Net's own.

        Returns:
            The score of the weights at the start of the round, and the mean training loss of the last epoch.
        """
        return self._train(self.schedule.epochs_per_round, progress)

    def finetune(self, epochs: int, progress: Progress = lambda done, total: None) -> None:
        """Train on after the last round (``begin_round`` with the number of rounds), at a constant learning rate.

        These epochs lengthen the training: they are in nnU-Net's logs, and in the epoch that ``finish`` stores.
        """
        trainer = self.trainer
        trainer.num_epochs += epochs
        trainer.save_every = trainer.num_epochs + 1
        rate = FINETUNE_RATE * trainer.initial_lr
        trainer.lr_scheduler = PolyLRScheduler(trainer.optimizer, rate, trainer.num_epochs, exponent=0)
        self._train(epochs, progress)

    def _train(self, epochs: int, progress: Progress) -> tuple[Score, float]:
        trainer, first_score, loss = self.trainer, None, math.nan
        iterations = trainer.num_iterations_per_epoch
        for epoch in range(epochs):
            trainer.on_epoch_start()
            score = self.evaluate()
            first_score = first_score or score
            trainer.on_train_epoch_start()
            outputs = []
            for iteration in range(iterations):
                outputs.append(trainer.train_step(next(trainer.dataloader_train)))
                progress(epoch * iterations + iteration + 1, epochs * iterations)
            trainer.on_train_epoch_end(outputs)
            loss = float(trainer.logger.get_value("train_losses", step=-1))
            trainer.on_epoch_end()
        return first_score, loss

    def save(self, file: Path) -> None:
        """Write weights, momentum, loss scale and logs atomically: a full disk leaves the previous file intact."""
        trainer = self.trainer
        logs = trainer.logger.local_logger.my_fantastic_logging
        state = {
            "layers": dict(canonical_tensors(self.network)),
            "optimizer": trainer.optimizer.state_dict(),
            "grad_scaler": trainer.grad_scaler.state_dict() if trainer.grad_scaler is not None else None,
            "logs": {name: [_plain(value) for value in values] for name, values in logs.items()},
        }
        write_checkpoint(file, lambda handle: torch.save(state, handle))

    def restore(self, file: Path) -> None:
        """Load what ``save`` wrote.

        Raises:
            StateError: the file is not readable or of another network.
        """
        try:
            state = torch.load(file, map_location=self.trainer.device, weights_only=True)
            layers = {name: tensor.cpu().numpy() for name, tensor in state["layers"].items()}
            write_layers(self.network, layers)
            self.trainer.optimizer.load_state_dict(state["optimizer"])
            if self.trainer.grad_scaler is not None and state["grad_scaler"]:
                self.trainer.grad_scaler.load_state_dict(state["grad_scaler"])
            self.trainer.logger.load_checkpoint(state["logs"])
        except Exception as error:  # torch raises many things for a file that is not its own
            raise StateError(
                field=f"checkpoint {file.name}",
                expected="the state of an earlier round",
                found=type(error).__name__,
                remedy="remove the file; the site goes on from the one before, or with fresh momentum and local layers",
                local_detail=str(error),
            ) from error

    def finish(self) -> Path:
        """Write ``checkpoint_final.pth`` as nnU-Net does, for prediction and ``nnUNetv2_train --c`` and ``--val``.

        Returns:
            nnU-Net's model folder, holding plans.json, dataset.json and ``fold_X``.
        """
        trainer = self.trainer
        trainer.current_epoch = trainer.num_epochs - 1  # save_checkpoint stores the next epoch
        logs = trainer.logger.local_logger.my_fantastic_logging
        _align_logs(logs, trainer.num_epochs)
        best_ema, trainer._best_ema = trainer._best_ema, logs["ema_fg_dice"][-1] if logs["ema_fg_dice"] else None
        final = Path(trainer.output_folder) / "checkpoint_final.pth"
        write_checkpoint(final, trainer.save_checkpoint)
        trainer._best_ema = best_ema
        with contextlib.suppress(Exception):  # a picture; nnU-Net's own drawing, of logs that may hold gaps
            type(trainer.logger).plot_progress_png(trainer.logger, trainer.output_folder)
        return Path(trainer.output_folder_base)


def write_checkpoint(file: Path, save: Callable[[BinaryIO], object]) -> None:
    """Let ``torch.save`` write atomically.

    Raises:
        OSError: what the disk said. torch closes its archive over it and reports a position in the file instead.
    """

    def write(temporary: Path) -> None:
        with temporary.open("wb") as handle:
            try:
                save(handle)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    write_atomically(file, write)


def _make_augmentation_reproducible(trainer: nnUNetTrainer) -> None:
    """Stop the Gaussian blur from choosing its algorithm by a stopwatch (in-process augmentation only)."""
    if isinstance(trainer.dataloader_train, SingleThreadedAugmenter):
        pending = [trainer.dataloader_train.data_loader.transforms]
        while pending:
            transform = pending.pop()
            if isinstance(transform, GaussianBlurTransform):
                transform.benchmark = False
            pending += [*getattr(transform, "transforms", []), *filter(None, [getattr(transform, "transform", None)])]


def _align_logs(logs: dict[str, list[Any]], num_epochs: int) -> None:
    """Give every list of nnU-Net's logger exactly one entry per finished epoch.

    A repeated round drops what it logged before; a missed one repeats the last value known.
    """
    for name, values in logs.items():
        del values[num_epochs:]
        filler = values[-1] if values else ([math.nan] if name == "dice_per_class_or_region" else math.nan)
        values.extend([filler] * (num_epochs - len(values)))


def _plain(value: Any) -> Any:
    return [float(item) for item in value] if isinstance(value, list | tuple) else float(value)
