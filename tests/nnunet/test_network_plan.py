from __future__ import annotations

import pytest

from nnunet_flare.errors import PlansError
from nnunet_flare.nnunet.network_plan import check_classes


def plans(**changes) -> dict:
    kwargs = {
        "conv_op": "torch.nn.modules.conv.Conv2d",
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
        "dropout_op": None,
        "nonlin": "torch.nn.LeakyReLU",
    }
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": kwargs | changes,
        "_kw_requires_import": list(kwargs),
    }
    if "network_class_name" in changes:
        architecture["network_class_name"] = changes["network_class_name"]
    return {"configurations": {"2d": {"architecture": architecture}}}


def test_the_classes_that_nnunets_planners_name_pass():
    check_classes(plans(), "2d")
    check_classes(plans(nonlin="torch.nn.modules.activation.ReLU"), "2d")


@pytest.mark.parametrize("key", ["nonlin", "conv_op", "network_class_name"])
@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "torch.nn.modules.module.os.system",
        "torch.nn.functional.relu",
        "torch.hub.load",
        "builtins.eval",
        ["os", "system"],
        {"a": 1},
        1,
    ],
)
def test_any_other_function_or_class_is_refused_before_nnunet_imports_it(key, name):
    with pytest.raises(PlansError, match="a class of torch") as refused:
        check_classes(plans(**{key: name}), "2d")
    assert key in refused.value.field
