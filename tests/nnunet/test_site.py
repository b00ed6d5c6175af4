from __future__ import annotations

import json
from pathlib import Path

import pytest

from nnunet_flare.errors import ConfigError
from nnunet_flare.nnunet.site import SiteSettings


def write(folder: Path, **settings) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nnunet_flare.json").write_text(json.dumps(settings))
    return folder


def test_without_a_file_nnunets_own_variables_hold(home, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", "/data/raw")
    settings = SiteSettings.load("site-1")
    assert settings.raw_root == Path("/data/raw")
    assert settings.folder == home / "site-1"
    assert settings.preprocessed_root == home / "site-1" / "nnUNet_preprocessed" / "federated"


def test_the_kits_file_goes_before_the_named_one_and_both_before_the_variables(home, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", "/variable")
    named = write(tmp_path / "named", nnunet_raw="/named")
    monkeypatch.setenv("NNUNET_FLARE_SETTINGS", str(named / "nnunet_flare.json"))
    assert SiteSettings.load("site-1", tmp_path / "empty").raw_root == Path("/named")
    assert SiteSettings.load("site-1", write(tmp_path / "kit", nnunet_raw="/kit")).raw_root == Path("/kit")


def test_a_sites_map_overrules_the_settings_around_it_for_its_site_only(home, tmp_path):
    local = write(tmp_path, dataset="shared", num_processes=3, sites={"site-2": {"dataset": "own"}})
    assert SiteSettings.load("site-1", local).dataset == "shared"
    settings = SiteSettings.load("site-2", local)
    assert (settings.dataset, settings.num_processes) == ("own", 3)


def test_the_site_names_its_data_set_or_else_the_job_does(home):
    settings = SiteSettings.load("site-1")
    assert settings.with_dataset("job's").dataset == "job's"
    assert settings.with_dataset("site's").with_dataset("job's").dataset == "site's"


def test_settings_survive_the_way_to_the_nnunet_process(home, tmp_path):
    local = write(tmp_path, nnunet_raw="~/raw", device="cpu", plans_overrides={"batch_size": 4})
    settings = SiteSettings.load("site-1", local)
    assert SiteSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    assert settings.raw_root == home.parent / "raw"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"datset": "x"}, "datset"),
        ({"role": "observe"}, "observe"),
        ({"device": "tpu"}, "tpu"),
        ({"num_processes": 0}, "0"),
        ({"num_threads": True}, "True"),
        ({"num_processes": 1.5}, "1.5"),
        ({"num_augmentation_processes": -1}, "-1"),
        ({"gpu_memory_gb": -1}, "-1"),
        ({"plans_overrides": [1]}, "[1]"),
        ({"dataset": ["x"]}, "['x']"),
        ({"sites": [1]}, "AttributeError"),
        ({"home": 5}, "TypeError"),
    ],
)
def test_a_wrong_setting_is_refused_with_site_and_value(home, tmp_path, settings, named):
    with pytest.raises(ConfigError) as refused:
        SiteSettings.load("site-2", write(tmp_path, **settings))
    assert refused.value.site == "site-2"
    assert named in refused.value.found


@pytest.mark.parametrize("text", ["{", "[1]", '"text"'])
def test_a_file_that_is_no_json_object_is_refused(home, tmp_path, text):
    (tmp_path / "nnunet_flare.json").write_text(text)
    with pytest.raises(ConfigError, match="a JSON object"):
        SiteSettings.load("site-1", tmp_path)


def test_a_file_that_is_named_but_absent_is_refused(home, monkeypatch):
    monkeypatch.setenv("NNUNET_FLARE_SETTINGS", "/absent/nnunet_flare.json")
    with pytest.raises(ConfigError, match="FileNotFoundError"):
        SiteSettings.load("site-1")


def test_a_site_that_keeps_layers_lets_no_whole_model_travel():
    assert SiteSettings(site="site-1", keep_local=["norm"]).keep_local == ("norm",)
    assert SiteSettings(site="site-1", share_model=True).share_model
    with pytest.raises(ConfigError, match="share_model: expected false beside keep_local"):
        SiteSettings(site="site-1", keep_local=["norm"], share_model=True)
