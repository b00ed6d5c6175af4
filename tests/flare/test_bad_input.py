"""What users, data and sites get wrong: the error names who and what, and the others go on where they can."""

from __future__ import annotations

import gzip
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.fuel.utils import fobs

from conftest import TINY_TRAINING, settings_of
from inline import run_inline
from loopback import Loopback
from nnunet_flare.cli import main
from nnunet_flare.errors import ConfigError
from nnunet_flare.flare.ffe import FFEController
from nnunet_flare.flare.history import RoundRecord, RunHistory
from nnunet_flare.flare.protocol import DESCRIBE, EXTRACT_FINGERPRINT, TRAIN, Message, read_message

SITES = ("site-1", "site-2")
DATASET = "Dataset900_Demo"
UP_TO_PLAN = TINY_TRAINING | {"stop_after": "plan"}


pytestmark = pytest.mark.usefixtures("inline")


@pytest.fixture
def dataset(demo_home: Path) -> Path:
    """The data set of site-2, in which things go wrong."""
    return demo_home / "site-2" / "nnUNet_raw" / DATASET


def panic_of(federation: Loopback, **options: Any) -> str:
    federation.run("bad", **{"training": UP_TO_PLAN} | options)
    (panic,) = federation.panics
    assert "phantom" not in panic.lower(), "the panic names a case"
    return panic


# --- data sets ------------------------------------------------------------------------------------------------------


def image_of(dataset: Path, number: int = 0) -> Path:
    return sorted((dataset / "imagesTr").iterdir())[number]


def label_of(dataset: Path, number: int = 0) -> Path:
    return sorted((dataset / "labelsTr").iterdir())[number]


def rewrite(file: Path, change: Callable[[np.ndarray], None], spacing_mm: tuple[float, ...] | None = None) -> None:
    image = SimpleITK.ReadImage(str(file))
    voxels = SimpleITK.GetArrayFromImage(image).astype(np.float32)
    change(voxels)
    changed = SimpleITK.GetImageFromArray(voxels)
    changed.SetSpacing(spacing_mm or image.GetSpacing())
    SimpleITK.WriteImage(changed, str(file))


def describe_as(dataset: Path, **changes: Any) -> None:
    file = dataset / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def convert_all(home: Path, ending: str) -> None:
    """Every site's files in another format; the names keep their order."""
    for site in SITES:
        dataset = home / site / "nnUNet_raw" / DATASET
        for file in [*dataset.glob("*Tr/*.nii.gz")]:
            SimpleITK.WriteImage(SimpleITK.ReadImage(str(file)), str(file).replace(".nii.gz", ending))
            file.unlink()
        describe_as(dataset, file_ending=ending)


def cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 6 // 10])


def lose_the_data_set(dataset: Path) -> None:
    shutil.rmtree(dataset)


def empty_the_data_set(dataset: Path) -> None:
    for file in dataset.glob("*Tr/*"):
        file.unlink()


def lose_a_label(dataset: Path) -> None:
    label_of(dataset).unlink()


def lose_an_image(dataset: Path) -> None:
    image_of(dataset).unlink()


def describe_a_channel_too_many(dataset: Path) -> None:
    describe_as(dataset, channel_names={"0": "MRI", "1": "T2"})


def copy_in_other_letters(dataset: Path) -> None:
    for file in (image_of(dataset), label_of(dataset)):
        shutil.copy(file, file.with_name(file.name.replace("phantom", "Phantom")))


def rename_the_channel(dataset: Path) -> None:
    describe_as(dataset, channel_names={"0": "CT"})


def rename_a_label(dataset: Path) -> None:
    describe_as(dataset, labels={"background": 0, "RV": 1, "wall": 2, "LV": 3})


def swap_two_labels(dataset: Path) -> None:
    describe_as(dataset, labels={"background": 0, "RV": 2, "MYO": 1, "LV": 3})


def plant_an_unknown_label(dataset: Path) -> None:
    rewrite(label_of(dataset), lambda voxels: voxels.__setitem__((2, 2, 2), 7))


def cut_a_voxel_layer_off_a_label(dataset: Path) -> None:
    label = SimpleITK.ReadImage(str(label_of(dataset)))
    SimpleITK.WriteImage(label[:, :, 1:], str(label_of(dataset)))


def stretch_a_label(dataset: Path) -> None:
    rewrite(label_of(dataset), lambda voxels: None, spacing_mm=(9.0, 1.0, 1.0))


def break_an_image_off(dataset: Path) -> None:
    cut(image_of(dataset, 1))


def break_a_label_off(dataset: Path) -> None:
    cut(label_of(dataset, 1))


def compress_a_broken_image(dataset: Path) -> None:
    """A whole archive of a file that was copied in part."""
    file = image_of(dataset, 1)
    content = gzip.decompress(file.read_bytes())
    file.write_bytes(gzip.compress(content[: len(content) // 2]))


def write_text_into_an_image(dataset: Path) -> None:
    image_of(dataset, 1).write_text("no image")


@pytest.mark.parametrize(
    ("go_wrong", "field", "found"),
    [
        (lose_the_data_set, "dataset", "0 of that name among 0"),
        (empty_the_data_set, "imagesTr", "none"),
        (lose_a_label, "labelsTr", "1 cases without a file in labelsTr"),
        (lose_an_image, "imagesTr", "1 cases without a file in imagesTr"),
        (describe_a_channel_too_many, "imagesTr", "5 cases with other channels"),
        (copy_in_other_letters, "imagesTr", "2 names with two"),
        (rename_the_channel, "dataset.json: channel_names", "{0: 'CT'}"),
        (rename_a_label, "dataset.json: labels", "{'wall': 2}"),
        (swap_two_labels, "dataset.json: labels", "{'RV': 2, 'MYO': 1}"),
        (plant_an_unknown_label, "label values", "1 of 5 cases with other label values"),
        (cut_a_voxel_layer_off_a_label, "label shape", "1 of 5 cases with another shape"),
        (stretch_a_label, "label spacing", "1 of 5 cases with another spacing"),
        (break_an_image_off, "image and label files", "1 of 5 cases with unreadable files"),
        (break_a_label_off, "image and label files", "1 of 5 cases with unreadable files"),
        (compress_a_broken_image, "image and label files", "1 of 5 cases with unreadable files"),
        (write_text_into_an_image, "image and label files", "1 of 5 cases with unreadable files"),
    ],
)
def test_a_data_set_that_cannot_be_used_ends_the_job_with_site_field_and_finding(
    dataset, tmp_path, go_wrong, field, found
):
    go_wrong(dataset)
    panic = panic_of(Loopback(tmp_path, SITES))
    assert panic.startswith(f"site-2: {field}: expected ")
    assert f", found {found}; " in panic


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_image_with_a_voxel_that_is_no_number_ends_the_job(dataset, demo_home, tmp_path, value):
    convert_all(demo_home, ".mha")  # SimpleITK reads such voxels of NIfTI files as 0, and so does nnU-Net
    rewrite(image_of(dataset), lambda voxels: voxels.__setitem__((2, 2, 2), value))
    panic = panic_of(Loopback(tmp_path, SITES))
    assert panic.startswith("site-2: image voxels: expected finite numbers, found 1 of 5 cases with NaN or infinite")


def test_an_uncompressed_file_that_breaks_off_ends_the_job(dataset, demo_home, tmp_path):
    convert_all(demo_home, ".nii")
    cut(image_of(dataset, 1))
    assert panic_of(Loopback(tmp_path, SITES)).startswith("site-2: image and label files: ")


@pytest.mark.parametrize("num_validation_cases", [0, 5])
def test_a_fold_without_training_or_validation_cases_ends_the_job_with_a_remedy(
    dataset, tmp_path, num_validation_cases
):
    cases = sorted(file.name.removesuffix(".nii.gz") for file in (dataset / "labelsTr").iterdir())
    split = {"train": cases[num_validation_cases:], "val": cases[:num_validation_cases]}
    (dataset / "splits_final.json").write_text(json.dumps([split]))
    panic = panic_of(Loopback(tmp_path, SITES), training=TINY_TRAINING)
    assert panic.startswith("site-2: fold: expected training and validation cases, found ")
    assert "splits_final.json" in panic


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("training", "federation", "message"),
    [
        ({"num_round": 3}, {}, "num_rounds.*found num_round;"),
        ({"Dataset": "demo", "epochs": 3}, {}, "found Dataset, epochs;"),
        ({"num_rounds": 0}, {}, "num_rounds: expected a positive integer, found 0"),
        ({"num_rounds": 2.5}, {}, "num_rounds"),
        ({"num_rounds": True}, {}, "num_rounds"),
        ({"fold": "first"}, {}, "fold: expected 0, 1, 2"),
        ({"fold": -1}, {}, "fold"),
        ({"dataset": "/data/Dataset027_ACDC"}, {}, "never a path"),
        ({"pretrained": "../../secret.pth"}, {}, "pretrained: expected a file name"),
        ({"weighting": "size"}, {}, "weighting: expected one of cases, uniform, found 'size'"),
        ({"momentum": "drop"}, {}, "momentum"),
        ({"update": "gradient"}, {}, "update"),
        ({"wire_dtype": "bfloat16"}, {}, "wire_dtype"),
        ({"stop_after": "training"}, {}, "stop_after: expected one of None, fingerprint, plan, preprocess"),
        ({"plans_overrides": ["batch_size"]}, {}, "plans_overrides"),
        ({"num_foreground_voxels": 0}, {}, "num_foreground_voxels"),
        ({"nsd_tolerance_mm": -1}, {}, "nsd_tolerance_mm"),
        ({"nsd_tolerance_mm": float("nan")}, {}, "nsd_tolerance_mm"),
        ({"nsd_tolerance_mm": True}, {}, "nsd_tolerance_mm"),
        ({}, {"min_site": 2}, "min_sites.*found min_site;"),
        ({}, {"min_sites": 0}, "min_sites"),
        ({}, {"round_timeout_s": 0.5}, "round_timeout_s"),
    ],
)
def test_a_wrong_setting_of_the_job_is_refused_as_the_job_is_read(training, federation, message):
    with pytest.raises(ConfigError, match=message):
        FFEController("bad", training, federation)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "num_round=3"], "found num_round"),
        (["--set", "num_rounds=many"], "num_rounds: expected a positive integer, found 'many'"),
        (["--set", "num_rounds"], "SETTING=VALUE"),
        (["--min-sites", "0"], "min_sites"),
    ],
)
def test_a_wrong_setting_on_the_command_line_is_refused_and_no_job_is_written(tmp_path, capsys, arguments, message):
    assert main(["job", "bad", "--out", str(tmp_path / "jobs"), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "jobs").exists()


def test_a_misspelt_setting_of_a_site_ends_the_job_with_the_sites_name(demo_home, tmp_path):
    settings_of("site-2", tmp_path, gpu_memory=8)
    panic = panic_of(Loopback(tmp_path, SITES))
    assert panic.startswith("site-2: nnunet_flare.json: expected keys among ")
    assert "found gpu_memory; correct the spelling" in panic


def test_sites_whose_network_plans_differ_are_named_with_the_key_and_both_values(demo_home, tmp_path):
    settings_of("site-2", tmp_path, plans_overrides={"architecture.arch_kwargs.conv_bias": False})
    panic = panic_of(Loopback(tmp_path, SITES))
    assert panic.startswith("architecture.arch_kwargs.conv_bias: expected one value at all sites, found ")
    assert "true at site-1, false at site-2" in panic
    assert "plans_overrides" in panic.partition("; ")[2]


def test_an_override_that_does_not_fit_the_plans_names_the_site(demo_home, tmp_path):
    settings_of("site-2", tmp_path, plans_overrides={"batch": 4})
    panic = panic_of(Loopback(tmp_path, SITES))
    assert panic.startswith("site-2: plans_overrides: batch: expected one of batch_size, ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"configuration": "3d_cascade_fullres"}, "configuration: .*a cascade needs predictions of its previous stage"),
        ({"configuration": "4d"}, "configuration: expected one of 2d.*found 4d"),
        ({"planner": "MyPlanner"}, "planner: .*found MyPlanner"),
    ],
)
def test_what_nnunet_does_not_know_or_a_federation_cannot_do_ends_the_job_with_the_reason(
    demo_home, tmp_path, change, message
):
    panic = panic_of(Loopback(tmp_path, SITES), training=UP_TO_PLAN | change)
    with pytest.raises(AssertionError, match=f"site-1: {message}"):
        raise AssertionError(panic)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has the device that is to be missed")
def test_a_device_that_a_site_lacks_ends_the_job(demo_home, tmp_path):
    settings_of("site-2", tmp_path, device="mps")
    panic = panic_of(Loopback(tmp_path, SITES), training=TINY_TRAINING)
    assert panic.startswith("site-2: device: expected one of cpu")
    assert "found mps" in panic


@pytest.mark.parametrize("package", ["nnunetv2", "nnunet-flare"])
def test_different_versions_end_the_job_before_anything_is_computed(demo_home, tmp_path, package):
    def age(site: str, task: str, reply: Shareable) -> Shareable:
        message = read_message(reply, sender=site)
        if site == "site-2":
            message.content["versions"][package] = "0.1"
        return message.to_shareable()

    federation = Loopback(tmp_path, SITES, tamper=age)
    panic = panic_of(federation)
    assert panic.startswith(f"site-2: version of {package}: expected ")
    assert "(as at site-1), found 0.1; " in panic
    assert {task for _, task, _, _ in federation.sent} == {DESCRIBE}


# --- updates --------------------------------------------------------------------------------------------------------

THREE_SITES = ("site-1", "site-2", "site-3")
"""Three train, so that a mean is left when one is missing."""


def changed(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Shareable], Shareable]:
    def tamper(reply: Shareable) -> Shareable:
        message = read_message(reply, sender="test")
        layers = {name: array.copy() for name, array in message.layers.items()}
        change(layers)
        return replace(message, layers=layers).to_shareable()

    return tamper


def planted(value: float) -> Callable[[Shareable], Shareable]:
    return changed(lambda layers: layers[max(layers)].reshape(-1).__setitem__(-1, value))


def recast(dtype: type) -> Callable[[Shareable], Shareable]:
    return changed(lambda layers: layers.update({max(layers): layers[max(layers)].astype(dtype)}))


BAD_UPDATES: Mapping[str, tuple[Callable[[Shareable], Shareable | None], str]] = {
    "NaN": (planted(np.nan), "finite values"),
    "infinity": (planted(-np.inf), "finite values"),
    "an exploded value": (planted(2.0**22), "finite values"),
    "a missing layer": (changed(lambda layers: layers.pop(max(layers))), "1 missing layers"),
    "an extra layer": (changed(lambda layers: layers.update(patient=np.zeros(1, np.float32))), "1 extra layers"),
    "a wrong shape": (changed(lambda layers: layers.update({max(layers): layers[max(layers)][None]})), "shape"),
    "integers": (recast(np.int32), "named float arrays"),
    "no layers at all": (
        lambda reply: Message(content=read_message(reply, sender="test").content).to_shareable(),
        "missing layers",
    ),
    "whole weights instead of a difference": (
        lambda reply: replace(read_message(reply, sender="test"), difference=False).to_shareable(),
        "update: expected difference",
    ),
    "no scores": (lambda reply: replace(read_message(reply, sender="test"), content={}).to_shareable(), "expected"),
    "FLARE's failure code": (lambda reply: make_reply(ReturnCode.EXECUTION_EXCEPTION), "EXECUTION_EXCEPTION"),
    "something else": (lambda reply: Shareable({"weights": [1, 2]}), "message"),
    "silence": (lambda reply: None, "a reply within"),
}


def training_requests(federation: Loopback, site: str) -> list[Message]:
    """The messages that started a site's rounds."""
    return [
        read_message(fobs.loads(request), sender="server")
        for name, task, request, _ in federation.sent
        if (name, task) == (site, TRAIN)
    ]


def updates_of(federation: Loopback, site: str) -> list[Message]:
    """What a site answered, before anything happened to it on the way."""
    return [
        read_message(fobs.loads(reply), sender=site)
        for name, task, _, reply in federation.sent
        if (name, task) == (site, TRAIN)
    ]


def rounds_of(home: Path, run: str) -> tuple[RoundRecord, ...]:
    return RunHistory.load(home / "server" / "runs" / run).rounds


def global_layers(home: Path, run: str, round_number: int) -> dict[str, np.ndarray]:
    with np.load(home / "server" / "runs" / run / "state" / f"global_{round_number:05d}.npz") as stored:
        return dict(stored)


@pytest.mark.slow
def test_a_bad_update_is_left_out_by_name_and_its_site_is_back_in_the_next_round(demo_home, tmp_path):
    answered: Counter[str] = Counter()
    faults = list(BAD_UPDATES.values())

    def spoil_one_site_in_each_round(site: str, task: str, reply: Shareable) -> Shareable | None:
        if task != TRAIN:
            return reply
        number = answered[site]
        answered[site] += 1
        return faults[number][0](reply) if site == THREE_SITES[number % 3] else reply

    federation = Loopback(tmp_path, THREE_SITES, tamper=spoil_one_site_in_each_round)
    training = TINY_TRAINING | {"num_rounds": len(faults), "iterations_per_epoch": 1}
    federation.run("spoilt", training, {"min_sites": 2})
    assert federation.panics == []
    records = rounds_of(demo_home, "spoilt")
    starts = [request.layers for request in training_requests(federation, "site-1")]
    starts.append(global_layers(demo_home, "spoilt", len(faults)))
    updates = {site: updates_of(federation, site) for site in THREE_SITES}
    assert len(records) == len(faults)
    for number, (kind, (_, reason)) in enumerate(BAD_UPDATES.items()):
        victim = THREE_SITES[number % 3]
        others = set(THREE_SITES) - {victim}
        record = records[number]
        assert record.missing.keys() == {victim}, kind
        assert record.missing[victim].startswith(f"{victim}: "), kind
        assert reason in record.missing[victim], kind
        assert record.sites.keys() == others, kind
        for name, start in starts[number].items():
            mean = np.mean([updates[site][number].layers[name].astype(np.float64) for site in others], axis=0)
            np.testing.assert_allclose(starts[number + 1][name], start + mean, rtol=1e-6, atol=1e-7, err_msg=kind)


@pytest.mark.parametrize("kind", ["NaN", "silence"])
def test_with_too_few_updates_left_the_job_ends_naming_the_site_and_the_reason(demo_home, tmp_path, kind):
    spoil, reason = BAD_UPDATES[kind]
    tamper = lambda site, task, reply: spoil(reply) if (site, task) == ("site-2", TRAIN) else reply  # noqa: E731
    federation = Loopback(tmp_path, SITES, tamper=tamper)
    panic = panic_of(federation, training=TINY_TRAINING)
    assert panic.startswith("updates in round 1: expected at least 2, found 1 (site-2: ")
    assert reason in panic
    assert "lower min_sites" in panic
    history = RunHistory.load(demo_home / "server" / "runs" / "bad")
    assert (history.phase, history.error, history.rounds) == ("failed", panic, ())


def test_a_site_that_only_evaluates_scores_every_round_and_changes_nothing(demo_home, tmp_path):
    settings_of("site-2", tmp_path, role="evaluate")
    federation = Loopback(tmp_path, SITES)
    federation.run("judged", TINY_TRAINING | {"num_rounds": 2})
    assert federation.panics == []
    assert {task for site, task, _, _ in federation.sent if site == "site-2"}.isdisjoint({TRAIN})
    for record in rounds_of(demo_home, "judged"):
        assert record.sites.keys() == set(SITES)
        judge, trainer = record.sites["site-2"], record.sites["site-1"]
        assert (judge.role, judge.upload_bytes, judge.download_bytes) == ("evaluate", 0, trainer.download_bytes)
        assert judge.dice.keys() == trainer.dice.keys()
        assert np.isnan(judge.train_loss)
    starts = [request.layers for request in training_requests(federation, "site-1")]
    for number, update in enumerate(updates_of(federation, "site-1")):
        after = starts[number + 1] if number == 0 else global_layers(demo_home, "judged", 2)
        for name, start in starts[number].items():
            np.testing.assert_allclose(after[name], start + update.layers[name], rtol=1e-6, atol=1e-7)
    folder = demo_home / "server" / "runs" / "judged"
    assert json.loads((folder / "fingerprint_summary.json").read_text()) == next(
        read_message(fobs.loads(reply), sender=site).content["summary"]
        for site, task, _, reply in federation.sent
        if task == EXTRACT_FINGERPRINT and site == "site-1"
    )
    assert RunHistory.load(folder).final.keys() == set(SITES)


# --- settings that change how rounds go -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory, demo_data):
    """Home of a run of two rounds with the default settings."""
    folder = tmp_path_factory.mktemp("plain")
    for site in SITES:
        shutil.copytree(demo_data / site, folder / "home" / site / "nnUNet_raw")
    with pytest.MonkeyPatch.context() as patch:
        run_inline(patch)
        patch.setenv("NNUNET_FLARE_HOME", str(folder / "home"))
        federation = Loopback(folder, SITES)
        federation.run("plain", TINY_TRAINING | {"num_rounds": 2})
    assert federation.panics == []
    return folder / "home"


def run_two_rounds(folder: Path, **changes: Any) -> None:
    federation = Loopback(folder, SITES)
    federation.run("other", TINY_TRAINING | {"num_rounds": 2} | changes)
    assert federation.panics == []


@pytest.mark.slow
def test_float16_on_the_wire_halves_the_bytes_and_rounds_the_result(plain, demo_home, tmp_path):
    run_two_rounds(tmp_path, wire_dtype="float16")
    for half, full in zip(rounds_of(demo_home, "other"), rounds_of(plain, "plain"), strict=True):
        for site in SITES:
            assert half.sites[site].upload_bytes * 2 == full.sites[site].upload_bytes
            assert half.sites[site].download_bytes * 2 == full.sites[site].download_bytes
    expected = global_layers(plain, "plain", 1)
    for name, array in global_layers(demo_home, "other", 1).items():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, expected[name], rtol=2**-10, atol=2e-3, err_msg=name)


@pytest.mark.slow
def test_momentum_is_kept_by_default_and_its_reset_changes_the_second_round(plain, demo_home, tmp_path):
    run_two_rounds(tmp_path, momentum="reset")
    first, second = (
        [np.array_equal(array, global_layers(plain, "plain", number)[name]) for name, array in layers.items()]
        for number, layers in ((number, global_layers(demo_home, "other", number)) for number in (1, 2))
    )
    assert all(first)
    assert not all(second)


@pytest.mark.slow
def test_a_run_that_stops_after_each_stage_ends_like_one_that_does_not(plain, demo_home, tmp_path):
    training = TINY_TRAINING | {"num_rounds": 2}
    tasks = []
    for stage in ("fingerprint", "plan", "preprocess", None):
        federation = Loopback(tmp_path, SITES)
        federation.run("staged", training | {"stop_after": stage})
        assert federation.panics == []
        assert RunHistory.load(demo_home / "server" / "runs" / "staged").phase == "done"
        tasks += [task for _, task, _, _ in federation.sent]
    assert tasks.count(EXTRACT_FINGERPRINT) == len(SITES)
    expected = global_layers(plain, "plain", 2)
    for name, array in global_layers(demo_home, "staged", 2).items():
        np.testing.assert_array_equal(array, expected[name])


def pretrain(home: Path, file: str) -> Path:
    (home / "pretrained").mkdir(parents=True)
    return home / "pretrained" / file


def test_a_pretrained_checkpoint_that_is_absent_ends_the_job_before_data_are_read(demo_home, tmp_path):
    federation = Loopback(tmp_path, SITES)
    panic = panic_of(federation, training=TINY_TRAINING | {"pretrained": "heart.pth"})
    assert panic.startswith("server: pretrained: expected a checkpoint in the server's pretrained folder, found heart")
    assert federation.sent == []
    assert panic_of(federation, training=UP_TO_PLAN | {"pretrained": "art.pth"}).startswith("server: pretrained: ")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"network_weights": {"encoder.weight": torch.zeros(2)}}, "found 0 of "),
        ({"weights": {}}, "KeyError"),
        ([1, 2], "TypeError"),
        (b"no checkpoint at all", "UnpicklingError"),
    ],
    ids=["other layers", "other keys", "a list", "text"],
)
def test_a_pretrained_checkpoint_that_does_not_fit_ends_the_job(demo_home, tmp_path, content, found):
    file = pretrain(demo_home, "heart.pth")
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    panic = panic_of(Loopback(tmp_path, SITES), training=TINY_TRAINING | {"pretrained": "heart.pth"})
    assert panic.startswith("server: pretrained heart.pth: expected ")
    assert found in panic
    assert "name a checkpoint of such a network" in panic


@pytest.mark.slow
def test_a_pretrained_checkpoint_is_the_start_of_all_layers_but_the_heads(plain, demo_home, tmp_path):
    model = plain / "server" / "runs" / "plain" / "model" / "fold_0" / "checkpoint_final.pth"
    shutil.copy(model, pretrain(demo_home, "heart.pth"))
    federation = Loopback(tmp_path, SITES)
    federation.run("tuned", TINY_TRAINING | {"pretrained": "heart.pth", "num_rounds": 1, "seed": 1})
    assert federation.panics == []
    start, trained = global_layers(demo_home, "tuned", 0), global_layers(plain, "plain", 2)
    assert start.keys() == trained.keys()
    assert any(".seg_layers." in name for name in start)
    for name, array in start.items():
        if not name.endswith("bias"):  # new heads begin with a bias of 0, and the lowest is never trained
            assert np.array_equal(array, trained[name]) == (".seg_layers." not in name), name
