from __future__ import annotations

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet

from nnunet_flare.aggregation.network import KINDS, Layer
from nnunet_flare.aggregation.sharing import Sharing, SharingConfig
from nnunet_flare.errors import LayerMismatchError
from nnunet_flare.nnunet.weights import canonical_tensors, describe_network, read_layers, write_layers

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


# --- networks of different depth ------------------------------------------------------------------------------------


def described(network: torch.nn.Module, alignment: str, outputs=("background", "RV", "MYO")) -> dict[str, Layer]:
    return describe_network(network, alignment=alignment, channels=["MRI"], outputs=outputs)


def u_net(kind: type, num_stages: int) -> torch.nn.Module:
    """A 2d network as nnU-Net plans it, with ``num_stages`` stages."""
    per_stage = "n_conv_per_stage" if kind is PlainConvUNet else "n_blocks_per_stage"
    return kind(
        input_channels=1,
        n_stages=num_stages,
        features_per_stage=[min(512, 32 * 2**stage) for stage in range(num_stages)],
        conv_op=torch.nn.Conv2d,
        kernel_sizes=[[3, 3]] * num_stages,
        strides=[[1, 1]] + [[2, 2]] * (num_stages - 1),
        num_classes=3,
        n_conv_per_stage_decoder=[2 if kind is PlainConvUNet else 1] * (num_stages - 1),
        conv_bias=True,
        norm_op=torch.nn.InstanceNorm2d,
        norm_op_kwargs={"affine": True},
        nonlin=torch.nn.LeakyReLU,
        deep_supervision=True,
        **{per_stage: [2] * num_stages},
    )


@pytest.mark.parametrize("kind", [PlainConvUNet, ResidualEncoderUNet])
@pytest.mark.parametrize(("small", "large"), [(6, 7), (7, 8), (6, 8)])
def test_by_resolution_all_of_the_shallower_network_is_shared(kind, small, large):
    networks = {"site-1": u_net(kind, small), "site-2": u_net(kind, large)}
    shared = {}
    for alignment in ("name", "resolution"):
        sites = {site: described(network, alignment) for site, network in networks.items()}
        shared[alignment] = Sharing.among(sites, SharingConfig(alignment=alignment)).coverage()["site-1"]["shared"]
    assert shared["resolution"] == 1.0
    assert shared["name"] < 1
    if (kind, small, large) == (PlainConvUNet, 6, 7):
        assert shared["name"] == pytest.approx(0.852, abs=5e-4)


def test_by_resolution_decoder_stages_that_meet_the_same_encoder_level_share_a_name():
    layers = described(u_net(PlainConvUNet, 4), "resolution")
    for level in range(3):
        width = layers[f"encoder.stages.{level}.0.convs.0.conv.weight"].shape[0]
        for part in ("stages.level_{}.convs.0.conv.weight", "seg_layers.level_{}.weight"):
            shape = layers[f"decoder.{part.format(level)}"].shape
            assert width in shape[:2]


def test_layers_are_told_by_kind_and_meaning():
    layers = described(torch.compile(u_net(PlainConvUNet, 3)), "name")
    assert layers == described(u_net(PlainConvUNet, 3), "name")
    kinds = {kind: {name for name, layer in layers.items() if layer.kind == kind} for kind in KINDS}
    assert all(".norm." in name for name in kinds["norm"])
    assert all("seg_layers" in name for name in kinds["head"])
    assert all(name.endswith(".bias") for name in kinds["bias"])
    assert sum(map(len, kinds.values())) == len(layers)
    first = [name for name, layer in layers.items() if "MRI" in layer.meaning]
    assert first == ["encoder.stages.0.0.convs.0.conv.weight"]
    other = described(u_net(PlainConvUNet, 3), "name", outputs=("background", "MYO", "RV"))
    assert {name for name in layers if layers[name] != other[name]} == kinds["head"]


def test_the_last_layer_of_another_network_is_its_head():
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 3, 1))
    layers = described(network, "resolution")
    assert {name for name, layer in layers.items() if layer.kind == "head"} == {"2.weight", "2.bias"}
    assert {name for name, layer in layers.items() if layer.kind == "norm"} == {
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.running_var",
    }
