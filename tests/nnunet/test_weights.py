from __future__ import annotations

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet

from nnunet_flare.errors import LayerMismatchError
from nnunet_flare.nnunet.weights import canonical_tensors, read_layers, write_layers

STAGES = 3
COMMON = {
    "n_stages": STAGES,
    "features_per_stage": [4, 8, 8],
    "conv_op": torch.nn.Conv2d,
    "kernel_sizes": 3,
    "strides": [1, 2, 2],
    "n_conv_per_stage_decoder": 1,
    "conv_bias": True,
    "norm_op": torch.nn.InstanceNorm2d,
    "norm_op_kwargs": {"affine": True},
    "nonlin": torch.nn.LeakyReLU,
    "deep_supervision": True,
}


def plain(norm_op=torch.nn.InstanceNorm2d) -> torch.nn.Module:
    return PlainConvUNet(1, num_classes=3, n_conv_per_stage=2, **COMMON | {"norm_op": norm_op})


def residual() -> torch.nn.Module:
    return ResidualEncoderUNet(1, num_classes=3, n_blocks_per_stage=1, **COMMON)


@pytest.mark.parametrize("build", [plain, residual])
def test_each_tensor_has_one_name_though_nnunet_gives_it_several(build):
    network = build()
    tensors = canonical_tensors(network)
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == len(tensors)
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    assert sum(tensor.numel() for tensor in tensors.values()) == num_parameters
    assert len(network.state_dict()) > len(tensors)


@pytest.mark.parametrize("build", [plain, residual])
def test_written_layers_show_under_every_alias(build):
    source, target = build(), build()
    write_layers(target, read_layers(source))
    for name, tensor in source.state_dict().items():
        torch.testing.assert_close(target.state_dict()[name], tensor, rtol=0, atol=0)


def test_what_is_read_does_not_change_when_the_network_trains_on():
    network = plain()
    layers = read_layers(network)
    before = {name: array.copy() for name, array in layers.items()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    for name, array in layers.items():
        np.testing.assert_array_equal(array, before[name])


def test_compiled_and_data_parallel_networks_have_the_same_names():
    network = plain()
    names = list(canonical_tensors(network))
    assert list(canonical_tensors(torch.compile(network))) == names
    assert list(canonical_tensors(torch.nn.DataParallel(network))) == names
    assert list(canonical_tensors(torch.nn.DataParallel(torch.compile(network)))) == names


def test_running_statistics_travel_but_counters_do_not():
    names = canonical_tensors(plain(torch.nn.BatchNorm2d))
    assert any(name.endswith("running_mean") for name in names)
    assert not any("num_batches_tracked" in name for name in names)


def test_half_precision_layers_are_written_in_full():
    network = plain()
    layers = {name: array.astype(np.float16) for name, array in read_layers(network).items()}
    write_layers(network, layers)
    for name, array in read_layers(network).items():
        np.testing.assert_array_equal(array, layers[name].astype(np.float32))


@pytest.mark.parametrize("change", ["unknown", "shape"])
def test_a_layer_that_does_not_fit_is_refused_by_name(change):
    network = plain()
    name = next(iter(read_layers(network)))
    wrong = {"other.weight": np.zeros(1, np.float32)} if change == "unknown" else {name: np.zeros(1, np.float32)}
    with pytest.raises(LayerMismatchError) as refused:
        write_layers(network, wrong)
    assert next(iter(wrong)) in refused.value.field
