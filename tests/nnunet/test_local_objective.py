"""The proximal term, frozen layers and fine-tuning: nnU-Net's own training step and optimizer on a small network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_flare.errors import ConfigError
from nnunet_flare.nnunet.local_objective import freeze_layers, proximal_term
from nnunet_flare.nnunet.stepper import FINETUNE_RATE, RoundSchedule, TrainerStepper

MU = 0.25  # a power of two: the product with it is exact


class SmallTrainer(nnUNetTrainer):
    """nnU-Net's trainer on random patches, without its network, plans and data."""

    def __init__(self, plans, configuration, fold, dataset_json, device):
        self.my_init_kwargs = {}
        self.is_ddp, self.local_rank, self.device = False, 0, device
        self.initial_lr, self.weight_decay, self.grad_scaler = 1e-2, 3e-5, None
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 3, 1
        self.was_initialized, self.disable_checkpointing = False, False
        self.inference_allowed_mirroring_axes = None
        self.output_folder_base = self.output_folder = dataset_json["folder"]
        self.logger = MetaLogger(self.output_folder, False)

    def initialize(self):
        self.network = small_network()
        self.optimizer, self.lr_scheduler = self.configure_optimizers()
        self.loss = torch.nn.functional.mse_loss
        self.was_initialized = True

    def on_train_start(self):
        self.dataloader_train = self.dataloader_val = random_patches()

    def validation_step(self, batch):
        counts = {name: np.ones(2) for name in ("tp_hard", "fp_hard", "fn_hard")}
        return counts | {"loss": np.float32(self.loss(self.network(batch["data"]), batch["target"]))}

    def print_to_log_file(self, *args, **kwargs):
        pass


def small_network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 1, 1))


def random_patches():
    while True:
        yield {"data": torch.randn(2, 1, 8, 8), "target": torch.randn(2, 1, 8, 8)}


def stepper_in(folder: Path, trainer=SmallTrainer, **arguments) -> TrainerStepper:
    return TrainerStepper(
        trainer,
        plans={},
        dataset_json={"folder": str(folder)},
        configuration="2d",
        fold=0,
        device=torch.device("cpu"),
        schedule=RoundSchedule(num_rounds=2, epochs_per_round=2),
        **arguments,
    )


def trained(stepper: TrainerStepper, mu: float = 0.0) -> dict[str, np.ndarray]:
    with proximal_term(stepper.network, stepper.layers(), mu=mu):
        stepper.begin_round(0, reset_momentum=False)
        stepper.train_round()
    return stepper.layers()


def assert_equal_layers(layers: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> None:
    assert list(layers) == list(others)
    for name, array in layers.items():
        np.testing.assert_array_equal(array, others[name], err_msg=name)


# --- the proximal term ------------------------------------------------------------------------------------------------


def test_a_step_equals_sgd_by_hand_with_the_pull_outside_the_clipping():
    layer = torch.nn.Linear(3, 2, bias=False)
    received = layer.weight.detach().numpy().copy()
    moved = received + np.float32([[0.5, -1, 2], [0, 0.25, -0.5]])
    data = np.float32([[300.0, -200.0, 100.0]])  # a gradient far beyond the norm of 12
    with proximal_term(layer, ["weight"], mu=MU):
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(moved))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
        layer(torch.from_numpy(data)).sum().backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 12)
        optimizer.step()
    gradient = np.repeat(data, 2, axis=0)
    clipped = gradient * (12 / np.linalg.norm(gradient))
    np.testing.assert_allclose(
        layer.weight.detach().numpy(), moved - 0.5 * (clipped + MU * (moved - received)), rtol=1e-6
    )


class PenalisedTrainer(SmallTrainer):
    """States the proximal term in the loss, for autograd to differentiate."""

    def initialize(self):
        super().initialize()
        anchors = [parameter.detach().clone() for parameter in self.network.parameters()]

        def loss(output, target):
            pairs = zip(self.network.parameters(), anchors, strict=True)
            pull = sum(((parameter - anchor) ** 2).sum() for parameter, anchor in pairs)
            return torch.nn.functional.mse_loss(output, target) + MU / 2 * pull

        self.loss = loss


def test_a_round_equals_one_whose_loss_states_the_term(tmp_path):
    by_hook, by_loss = trained(stepper_in(tmp_path), MU), trained(stepper_in(tmp_path, PenalisedTrainer))
    for name, array in by_hook.items():
        np.testing.assert_allclose(array, by_loss[name], rtol=1e-5, atol=1e-7, err_msg=name)
    plain = trained(stepper_in(tmp_path))
    assert np.abs(by_hook["0.weight"] - plain["0.weight"]).max() > 1e-4


def test_a_strength_of_zero_and_the_end_of_a_round_leave_plain_training(tmp_path):
    never, before = stepper_in(tmp_path), stepper_in(tmp_path)
    with proximal_term(before.network, before.layers(), mu=MU):
        pass
    never.begin_round(0, reset_momentum=False)
    never.train_round()
    assert_equal_layers(never.layers(), trained(before, mu=0.0))


def test_only_layers_that_were_received_are_pulled():
    network = small_network()
    with proximal_term(network, ["0.weight", "1.running_mean"], mu=MU):
        for parameter in network.parameters():
            parameter.data += 1
            parameter.grad = torch.zeros_like(parameter)
        torch.optim.SGD(network.parameters(), lr=1.0).step()
    for name, parameter in network.named_parameters():
        expected = MU if name == "0.weight" else 0.0
        np.testing.assert_allclose(parameter.grad.numpy(), expected, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_wrapped_networks_are_pulled_and_frozen_by_the_same_names(wrap):
    network = small_network()
    freeze_layers(wrap(network), ["^2"])
    with proximal_term(wrap(network), ["0.weight"], mu=MU):
        for parameter in (network[0].weight, network[0].bias):
            parameter.data += 1
            parameter.grad = torch.zeros_like(parameter)
        torch.optim.SGD(network.parameters(), lr=1.0).step()
    np.testing.assert_allclose(network[0].weight.grad.numpy(), MU, atol=1e-6)
    assert not network[0].bias.grad.any()
    assert not network[2].weight.requires_grad


@pytest.mark.parametrize("unscales", [True, False])
@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scale_does_not_scale_the_pull(fused, unscales):
    def step(scaler) -> np.ndarray:
        torch.manual_seed(0)
        layer, data = torch.nn.Linear(3, 2), torch.randn(4, 3)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, fused=fused)
        with proximal_term(layer, ["weight", "bias"], mu=MU):
            layer.weight.data += 1
            loss = layer(data).square().sum()
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                if unscales:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
        return layer.weight.detach().numpy()

    scaled, plain = step(torch.amp.GradScaler("cpu", init_scale=1024.0)), step(None)
    np.testing.assert_allclose(scaled, plain, rtol=1e-6)


# --- frozen layers ----------------------------------------------------------------------------------------------------


def test_frozen_parameters_stay_to_the_bit_and_the_others_train(tmp_path):
    stepper = stepper_in(tmp_path, freeze=[r"^0\.", r"^1\.bias$"])
    before = stepper.layers()
    after = trained(stepper, MU)
    unchanged = {name for name in before if np.array_equal(before[name], after[name])}
    assert unchanged == {"0.weight", "0.bias", "1.bias"}  # the running statistics are no parameters
    checkpoint = tmp_path / "round_00000.pt"
    stepper.save(checkpoint)
    resumed = stepper_in(tmp_path, freeze=[r"^0\.", r"^1\.bias$"])
    resumed.restore(checkpoint)
    for each in (stepper, resumed):
        each.begin_round(1, reset_momentum=False)
        each.train_round()
    assert_equal_layers(stepper.layers(), resumed.layers())
    np.testing.assert_array_equal(resumed.layers()["0.weight"], before["0.weight"])


@pytest.mark.parametrize("patterns", [["^0", "encoder"], ["running_mean"]])
def test_a_pattern_that_matches_no_parameter_is_named(tmp_path, patterns):
    with pytest.raises(ConfigError) as refused:
        stepper_in(tmp_path, freeze=patterns).layers()
    assert refused.value.field == "freeze"
    assert refused.value.found == repr(patterns[-1])


def test_a_network_that_is_frozen_as_a_whole_is_refused():
    with pytest.raises(ConfigError, match=r"still trains, found '\^\[012\]'"):
        freeze_layers(small_network(), ["^[012]"])


# --- fine-tuning ------------------------------------------------------------------------------------------------------


def finetuned(stepper: TrainerStepper, epochs: int) -> dict[str, np.ndarray]:
    stepper.begin_round(stepper.schedule.num_rounds, reset_momentum=False)
    stepper.finetune(epochs)
    return stepper.layers()


def test_finetuning_goes_on_at_a_constant_rate_and_is_in_nnunets_logs_and_final_checkpoint(tmp_path):
    stepper = stepper_in(tmp_path)
    trained(stepper)
    before = stepper.layers()
    after = finetuned(stepper, 3)
    assert all(not np.array_equal(before[name], after[name]) for name in before)
    stepper.finish()
    checkpoint = torch.load(tmp_path / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["current_epoch"] == 2 * 2 + 3
    assert {len(values) for values in checkpoint["logging"].values()} == {2 * 2 + 3}
    assert checkpoint["logging"]["lrs"][-3:] == [FINETUNE_RATE * stepper.trainer.initial_lr] * 3
    assert_equal_layers(after, {name: checkpoint["network_weights"][name].numpy() for name in after})
    assert not (tmp_path / "checkpoint_latest.pth").exists()


def test_repeated_finetuning_ends_with_the_same_bits(tmp_path):
    stepper = stepper_in(tmp_path)
    trained(stepper)
    stepper.save(tmp_path / "round_00001.pt")
    first = finetuned(stepper, 2)
    again = stepper_in(tmp_path)
    again.restore(tmp_path / "round_00001.pt")
    assert_equal_layers(first, finetuned(again, 2))
