from __future__ import annotations

import json
import os
import shutil
import subprocess
from importlib import metadata
from types import SimpleNamespace

import pytest

from nnunet_flare.nnunet.site import SiteSettings
from nnunet_flare.report import doctor
from nnunet_flare.report.doctor import FAIL, OK, WARN, Check, diagnose, doctor_text, exit_status
from nnunet_flare.report.traffic import layer_bytes

NAME = "Dataset007_Heart"
DATASET_JSON = {
    "channel_names": {"0": "MRI", "1": "T2"},
    "labels": {"background": 0, "ventricle": 1, "wall": 2},
    "numTraining": 5,
    "file_ending": ".nii.gz",
}
GPU = {"cuda": True, "mps": False, "free": 20e9, "total": 24e9, "name": "Some GPU"}
ARCHITECTURE = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {
        "n_stages": 3,
        "features_per_stage": [8, 16, 32],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * 3,
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        "n_conv_per_stage": [2, 2, 2],
        "n_conv_per_stage_decoder": [2, 2],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A sound site with five cases and a GPU."""
    folder = tmp_path / "raw" / NAME
    for name in [f"imagesTr/case{i}_000{c}.nii.gz" for i in range(5) for c in range(2)] + [
        f"labelsTr/case{i}.nii.gz" for i in range(5)
    ]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"0" * 1000)
    (folder / "dataset.json").write_text(json.dumps(DATASET_JSON))
    monkeypatch.setattr(doctor, "_probe_device", lambda: GPU)
    free_disk(monkeypatch, 1e12)
    return SiteSettings(site="site-1", home=tmp_path / "home", nnunet_raw=tmp_path / "raw", dataset=NAME)


def changed(settings: SiteSettings, **changes) -> SiteSettings:
    return SiteSettings(**{**{name: getattr(settings, name) for name in settings.__dataclass_fields__}, **changes})


def free_disk(monkeypatch, num_bytes: float) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=num_bytes))


def found(settings: SiteSettings, name: str) -> Check:
    (check,) = [check for check in diagnose(settings) if check.name == name]
    return check


def test_a_sound_site_is_ready_and_nothing_is_written(site, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    checks = diagnose(site)
    assert [check for check in checks if check.status != OK] == []
    assert exit_status(checks) == 0
    assert doctor_text(checks).endswith("ready: 0 failed, 0 warnings")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_versions_come_from_the_distribution_and_skip_the_extras(site):
    names = [check.name for check in diagnose(site)]
    assert {"python", "nvflare", "nnunetv2", "torch", "numpy"} <= set(names)
    assert "pytest" not in names
    assert found(site, "nvflare").seen.startswith(metadata.version("nvflare"))


@pytest.mark.parametrize(("installed", "seen"), [("1.26.4", "1.26.4"), (None, "not installed")])
def test_a_package_out_of_range_or_absent_fails(site, monkeypatch, installed, seen):
    real = metadata.version

    def version(name):
        if name == "numpy":
            if installed is None:
                raise metadata.PackageNotFoundError(name)
            return installed
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    check = found(site, "numpy")
    assert check.status == FAIL
    assert check.seen.startswith(seen)
    assert "install numpy>=2" in check.remedy


@pytest.mark.parametrize("dataset", [NAME, "7", 7])
def test_the_data_set_is_described(site, dataset):
    assert found(changed(site, dataset=dataset), "data set").seen == (
        f"{NAME}: 5 cases, channels MRI, T2, labels background, ventricle, wall, .nii.gz"
    )


def test_a_case_without_its_label_fails_and_is_named_at_the_site(site, tmp_path):
    (tmp_path / "raw" / NAME / "labelsTr" / "case3.nii.gz").unlink()
    check = found(site, "data set")
    assert check.status == FAIL
    assert "case3" in check.seen
    assert exit_status(diagnose(site)) == 1


def test_a_data_set_that_is_not_there_fails_and_one_that_is_not_named_warns(site):
    assert found(changed(site, dataset="Dataset008_Liver"), "data set").status == FAIL
    assert found(changed(site, dataset=None), "data set").status == WARN


def test_the_demo_needs_no_raw_data(site):
    checks = diagnose(changed(site, dataset="demo", nnunet_raw=None))
    assert exit_status(checks) == 0
    assert "raw data folder" not in [check.name for check in checks]


def test_a_missing_raw_data_folder_fails(site, tmp_path):
    check = found(changed(site, nnunet_raw=tmp_path / "nowhere"), "raw data folder")
    assert (check.status, check.seen) == (FAIL, f"no readable folder {tmp_path / 'nowhere'}")


def test_a_folder_that_cannot_be_written_fails(site, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    assert found(site, "state folder").status == FAIL
    assert found(site, "preprocessed folder").status == FAIL
    assert found(site, "raw data folder").status == OK


@pytest.mark.parametrize(("free", "status"), [(1e8, FAIL), (1e9, WARN), (1e10, OK)])
def test_the_disk_must_hold_state_and_preprocessed_data(site, monkeypatch, free, status):
    free_disk(monkeypatch, free)
    assert found(site, "disk").status == status


@pytest.mark.parametrize(
    ("device", "probe", "status"),
    [
        ("auto", {}, OK),
        ("cuda", {}, OK),
        ("cuda", {"cuda": False}, FAIL),
        ("auto", {"cuda": False}, WARN),
        ("cpu", {}, WARN),
        ("mps", {}, FAIL),
        ("mps", {"mps": True}, OK),
    ],
)
def test_the_device_asked_for_must_be_there(site, monkeypatch, device, probe, status):
    monkeypatch.setattr(doctor, "_probe_device", lambda: GPU | probe)
    assert found(changed(site, device=device), "device").status == status


@pytest.mark.parametrize(
    ("target", "free", "status"), [(None, 20e9, OK), (None, 6e9, WARN), (22.0, 20e9, WARN), (40.0, 24e9, FAIL)]
)
def test_the_planners_target_must_fit_into_the_gpu(site, monkeypatch, target, free, status):
    monkeypatch.setattr(doctor, "_probe_device", lambda: GPU | {"free": free})
    assert found(changed(site, gpu_memory_gb=target), "GPU memory").status == status


def test_a_torch_that_does_not_start_fails_with_its_last_words(site, monkeypatch):
    def crash():
        raise subprocess.CalledProcessError(1, "python", stderr="Traceback ...\nOSError: libcudart.so not found\n")

    monkeypatch.setattr(doctor, "_probe_device", crash)
    assert found(site, "device").seen == "torch does not start: OSError: libcudart.so not found"


def test_the_probe_of_this_machine_answers():
    assert set(doctor._probe_device()) == set(GPU)


def test_the_bytes_of_a_round_are_those_of_the_unique_parameters(site):
    import torch
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    assert found(site, "traffic").seen == "known after the first planning"
    folder = site.preprocessed_root / "0123abcd" / NAME
    folder.mkdir(parents=True)
    plans = {
        "plans_name": "nnUNetPlans",
        "configurations": {
            "2d": {"data_identifier": "nnUNetPlans_2d"},
            "3d_fullres": {"data_identifier": "nnUNetPlans_3d_fullres", "architecture": ARCHITECTURE},
        },
        "label_manager": "LabelManager",
    }
    for name, content in (("nnUNetPlans", plans), ("dataset", DATASET_JSON), ("splits_final", [])):
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "nnUNetPlans_3d_fullres.complete").touch()

    kwargs = ARCHITECTURE["arch_kwargs"] | {
        "conv_op": torch.nn.Conv3d,
        "norm_op": torch.nn.InstanceNorm3d,
        "nonlin": torch.nn.LeakyReLU,
    }
    network = PlainConvUNet(input_channels=2, num_classes=3, deep_supervision=True, **kwargs)
    num_bytes = 4 * sum(parameter.numel() for parameter in network.parameters())
    assert layer_bytes(folder / "nnUNetPlans_3d_fullres.complete") == ("3d_fullres", num_bytes)
    check = found(site, "traffic")
    assert check.status == OK
    assert f"at most {num_bytes / 1e6:.1f} MB up" in check.seen

    (folder / "nnUNetPlans.json").write_text("{}")
    assert found(site, "traffic").status == WARN


def test_the_text_fits_100_columns_and_tells_what_to_do():
    checks = [
        Check(name="disk", status=FAIL, seen="0.1 GB free, " * 12, remedy="free space, " * 12),
        Check(name="GPU memory", status=WARN, seen="busy", remedy="wait"),
    ]
    lines = doctor_text(checks).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith("fail  disk        0.1 GB free")
    assert "                  wait" in lines
    assert lines[-1] == "not ready: 1 failed, 1 warnings"
