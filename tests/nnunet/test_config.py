from __future__ import annotations

import json

import pytest

from nnunet_flare.errors import ConfigError
from nnunet_flare.nnunet.config import TrainingConfig


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("prox_mu", -0.1),
        ("prox_mu", float("nan")),
        ("prox_mu", float("inf")),
        ("prox_mu", True),
        ("prox_mu", "0.1"),
        ("freeze", "encoder"),
        ("freeze", ["encoder", ""]),
        ("freeze", [7]),
        ("freeze", None),
        ("freeze", ["encoder", "stages.(0"]),
        ("freeze", ["a{99999999999999999999}"]),
        ("freeze", ["(" * 5000]),
        ("finetune_epochs", -1),
        ("finetune_epochs", 1.0),
        ("finetune_epochs", True),
    ],
)
def test_a_local_objective_out_of_range_is_refused_by_name(setting, value):
    with pytest.raises(ConfigError) as refused:
        TrainingConfig(**{setting: value})
    assert refused.value.field == setting
    assert refused.value.found == repr(value)


def test_a_configuration_survives_json():
    config = TrainingConfig(prox_mu=0.01, freeze=[r"^encoder\.stages\.[01]\.", "norm"], finetune_epochs=2)
    assert TrainingConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_a_job_states_only_what_differs_from_the_defaults():
    assert TrainingConfig(freeze=[], prox_mu=0).changes() == {}
    changes = {"prox_mu": 0.5, "freeze": ["^encoder"], "finetune_epochs": 3}
    assert TrainingConfig(**changes).changes() == changes
