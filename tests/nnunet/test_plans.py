import copy
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK
import torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_flare.errors import DatasetError, PlansError
from nnunet_flare.fingerprint.summary import CaseValues, FingerprintSummary
from nnunet_flare.nnunet.network_plan import check_same_network_plans, network_plan
from nnunet_flare.nnunet.plans import plan
from nnunet_flare.nnunet.preprocess import fold_cases, preprocess

NUM_CASES, SHAPE, SPACING_MM = 6, (12, 20, 20), (2.0, 1.0, 1.0)
OPTIONS = {"num_training": 20, "configuration": "3d_fullres", "overrides": {}}


def write(file, array):
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(SPACING_MM[::-1])
    file.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(image, str(file))


def write_dataset(folder, channel_names=("CT", "MRI"), num_cases=NUM_CASES):
    for index in range(num_cases):
        rng = np.random.default_rng(index)
        label = np.zeros(SHAPE, np.uint8)
        label[3:8, 5:15, 5:12] = 1
        for channel in range(len(channel_names)):
            image = rng.normal(50 * (label + 1), 10, SHAPE).astype(np.float32)
            write(folder / "imagesTr" / f"patient_{index}_{channel:04d}.nii.gz", image)
        write(folder / "labelsTr" / f"patient_{index}.nii.gz", label)
    description = {
        "channel_names": dict(enumerate(channel_names)),
        "labels": {"background": 0, "organ": 1},
        "numTraining": num_cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("raw") / "Dataset007_Small")


@pytest.fixture(scope="module")
def summary():
    draws = np.linspace(-100, 200, 50)
    case = CaseValues(shape=SHAPE, spacing_mm=SPACING_MM, relative_size=0.5, intensities=[draws, draws + 7])
    return FingerprintSummary.from_cases([case] * 20)


@pytest.fixture(scope="module")
def plans(raw, summary):
    return plan(raw, summary, **OPTIONS)


def test_plans_equal_those_of_nnunets_own_command_on_a_data_set_of_the_pooled_size(
    raw, summary, plans, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    own = tmp_path / "raw" / raw.name
    own.mkdir(parents=True)
    for folder in ("imagesTr", "labelsTr"):
        (own / folder).symlink_to(raw / folder)
    description = json.loads((raw / "dataset.json").read_text()) | {"numTraining": 20}
    (own / "dataset.json").write_text(json.dumps(description))
    (tmp_path / "preprocessed" / raw.name).mkdir(parents=True)
    (tmp_path / "preprocessed" / raw.name / "dataset_fingerprint.json").write_text(json.dumps(summary.to_nnunet()))
    plan_experiment_dataset(raw.name)
    expected = json.loads((tmp_path / "preprocessed" / raw.name / "nnUNetPlans.json").read_text())
    capsys.readouterr()
    assert plan(raw, summary.to_nnunet(), **OPTIONS) == plans == expected
    assert capsys.readouterr().out == ""


def test_the_pooled_number_of_cases_decides_the_batch_size(raw, summary, plans):
    larger = plan(raw, summary, **OPTIONS | {"num_training": 2000})
    batch_sizes = [p["configurations"]["3d_fullres"]["batch_size"] for p in (plans, larger)]
    assert batch_sizes[0] < batch_sizes[1]


def test_planning_leaves_environment_and_threads_as_they_were(raw, summary, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.delenv("nnUNet_raw", raising=False)
    before, num_threads = dict(os.environ), torch.get_num_threads()
    plan(raw, summary, **OPTIONS)
    assert dict(os.environ) == before
    assert torch.get_num_threads() == num_threads


def test_another_planner_is_found_by_nnunets_own_lookup(raw, summary):
    chosen = plan(raw, summary, planner="nnUNetPlannerResEncM", gpu_memory_gb=8, **OPTIONS)
    assert chosen["plans_name"] == "nnUNetResEncUNetMPlans"
    assert chosen["experiment_planner_used"] == "nnUNetPlannerResEncM"


@pytest.mark.parametrize("name", ["NoSuchPlanner", "np", "PlainConvUNet"])
def test_an_unknown_planner_is_refused(raw, summary, name):
    with pytest.raises(PlansError, match=f"planner: .*found {name}"):
        plan(raw, summary, planner=name, **OPTIONS)


def test_an_unknown_configuration_is_refused_with_those_there_are(raw, summary):
    with pytest.raises(PlansError, match=r"one of 2d, 3d_fullres.*found 3d_huge"):
        plan(raw, summary, **OPTIONS | {"configuration": "3d_huge"})


def test_a_cascade_is_refused_with_the_reason(raw, summary):
    with pytest.raises(PlansError, match="predictions of its previous stage"):
        plan(raw, summary, **OPTIONS | {"configuration": "3d_cascade_fullres"})


def test_overrides_replace_keys_of_the_configuration_only(raw, summary, plans):
    overrides = {
        "batch_size": 5,
        "patch_size": [4, 8, 8],
        "spacing": [2, 1.5, 1.5],
        "normalization_schemes": ["ZScoreNormalization", "NoNormalization"],
        "use_mask_for_norm": [True, False],
        "batch_dice": True,
        "architecture.arch_kwargs.conv_bias": False,
        "architecture.arch_kwargs.dropout_op": "torch.nn.Dropout3d",
    }
    expected = copy.deepcopy(plans)
    for key, value in overrides.items():
        part = expected["configurations"]["3d_fullres"]
        *path, name = key.split(".")
        for step in path:
            part = part[step]
        part[name] = value
    assert plan(raw, summary, **OPTIONS | {"overrides": overrides}) == expected


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("batchsize", 2, "one of batch_size, patch_size"),
        ("architecture.arch_kwargs.depth", 2, "one of batch_size, patch_size"),
        ("data_identifier", "x", "one of batch_size, patch_size"),
        ("batch_size", "2", "a value like"),
        ("batch_size", True, "a value like"),
        ("batch_size", 0, "a value like"),
        ("batch_dice", 1, "a value like"),
        ("spacing", [1.0, 1.0], "a value like"),
        ("spacing", [1.0, 1.0, -1.0], "a value like"),
        ("spacing", [1.0, 1.0, float("nan")], "a value like"),
        ("normalization_schemes", ["CTNormalization", "NoSuchScheme"], "nnU-Net's"),
        ("patch_size", [8, 8, 9], "multiples of"),
        ("architecture.arch_kwargs.strides", 2, "a value like"),
    ],
)
def test_an_override_that_does_not_fit_is_refused_by_name(raw, summary, key, value, expected):
    with pytest.raises(PlansError) as refusal:
        plan(raw, summary, **OPTIONS | {"overrides": {key: value}})
    assert key in refusal.value.field
    assert expected in refusal.value.expected


def test_network_plans_hold_what_sites_must_share_and_not_what_they_may_choose(plans):
    shared = network_plan(plans, "3d_fullres")
    assert json.loads(json.dumps(shared)) == shared
    assert {key.partition(".")[0] for key in shared} == {
        "architecture",
        "foreground_intensity_properties_per_channel",
        "normalization_schemes",
        "preprocessor_name",
        "resampling_fn_data",
        "resampling_fn_data_kwargs",
        "resampling_fn_probabilities",
        "resampling_fn_probabilities_kwargs",
        "resampling_fn_seg",
        "resampling_fn_seg_kwargs",
        "spacing",
        "transpose_backward",
        "transpose_forward",
        "use_mask_for_norm",
    }
    intensities = {key.split(".")[1] for key in shared if key.startswith("foreground")}
    assert intensities == {"0"}, "only the CT channel is normalised by them"


def test_sites_that_differ_in_batch_and_patch_size_share_a_network(plans):
    other = copy.deepcopy(plans)
    other["configurations"]["3d_fullres"] |= {"batch_size": 9, "patch_size": [8, 16, 16]}
    check_same_network_plans({"a": network_plan(plans, "3d_fullres"), "b": network_plan(other, "3d_fullres")})


def test_sites_whose_networks_differ_are_named_with_key_and_values(plans):
    shared = network_plan(plans, "3d_fullres")
    key = "architecture.arch_kwargs.n_stages"
    other = {**shared, key: 99}
    del other["spacing"]
    with pytest.raises(PlansError) as refusal:
        check_same_network_plans({"site-1": shared, "site-2": other, "site-3": shared})
    assert refusal.value.field == f"{key}, spacing"
    assert f"{key}: {shared[key]} at site-1 and site-3, 99 at site-2" in refusal.value.found
    assert "nothing at site-2" in refusal.value.found


def test_comparing_network_plans_loads_neither_torch_nor_nnunet():
    code = "import sys, nnunet_flare.nnunet.plans; print({'torch', 'nnunetv2'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def prepare(raw, plans, summary, root, **options):
    return preprocess(raw, plans, summary.to_nnunet(), "3d_fullres", preprocessed_root=root, **options)


@pytest.fixture(scope="module")
def prepared(raw, plans, summary, tmp_path_factory):
    return prepare(raw, plans, summary, tmp_path_factory.mktemp("preprocessed") / "federated")


def contents(folder):
    return {str(f.relative_to(folder)): f.stat().st_mtime_ns for f in folder.rglob("[!.]*") if f.is_file()}


@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_preprocessed_cases_equal_those_of_nnunets_own_preprocessor(
    raw, plans, summary, tmp_path, monkeypatch, num_processes
):
    folder = prepare(raw, plans, summary, tmp_path / "federated", num_processes=num_processes)
    own = tmp_path / "own" / raw.name
    own.mkdir(parents=True)
    (own / "nnUNetPlans.json").write_text(json.dumps(plans))
    (own / "dataset.json").write_text((raw / "dataset.json").read_text())
    monkeypatch.setenv("nnUNet_raw", str(raw.parent))
    monkeypatch.setenv("nnUNet_preprocessed", str(own.parent))
    preprocessor = DefaultPreprocessor(verbose=False)
    preprocessor.show_progress_bar = False
    preprocessor.run(raw.name, "3d_fullres", "nnUNetPlans", num_processes=1)
    got, expected = (
        nnUNetDatasetBlosc2(str(root / raw.name / "nnUNetPlans_3d_fullres")) for root in (folder, own.parent)
    )
    assert got.identifiers == expected.identifiers == [f"patient_{index}" for index in range(NUM_CASES)]
    for case in expected.identifiers:
        (image, label, _, properties), (want_image, want_label, _, want) = got[case], expected[case]
        assert np.array_equal(image[:], want_image[:])
        assert np.array_equal(label[:], want_label[:])
        assert properties.keys() == want.keys()


def test_the_folder_is_complete_for_nnunet(raw, plans, summary, prepared):
    folder = prepared / raw.name
    assert json.loads((folder / "nnUNetPlans.json").read_text()) == plans
    assert json.loads((folder / "dataset_fingerprint.json").read_text()) == summary.to_nnunet()
    assert (folder / "dataset.json").read_text() == (raw / "dataset.json").read_text()
    labels = {file.name: file.read_bytes() for file in (raw / "labelsTr").iterdir()}
    assert {file.name: file.read_bytes() for file in (folder / "gt_segmentations").iterdir()} == labels


def test_what_is_complete_is_found_again_untouched(raw, plans, summary, prepared):
    before, seen = contents(prepared), []
    again = prepare(raw, plans, summary, prepared.parent, report=lambda *progress: seen.append(progress))
    assert (again, contents(prepared), seen) == (prepared, before, [])


def test_after_an_interruption_only_missing_cases_are_done(raw, plans, summary, tmp_path, monkeypatch):
    original = DefaultPreprocessor.run_case_save

    def killed_at_the_third_case(self, output, *arguments):
        original(self, output, *arguments)
        if output.endswith("patient_2"):
            os.remove(output + ".pkl")
            raise KeyboardInterrupt

    monkeypatch.setattr(DefaultPreprocessor, "run_case_save", killed_at_the_third_case)
    with pytest.raises(KeyboardInterrupt):
        prepare(raw, plans, summary, tmp_path)
    monkeypatch.undo()
    seen = []
    folder = prepare(raw, plans, summary, tmp_path, report=lambda *progress: seen.append(progress))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    cases = nnUNetDatasetBlosc2(str(folder / raw.name / "nnUNetPlans_3d_fullres"))
    assert [cases[case][0].shape for case in cases.identifiers] == [(2, *SHAPE)] * NUM_CASES


def test_other_plans_or_changed_files_are_never_served_old_data(plans, summary, tmp_path):
    raw = write_dataset(tmp_path / "raw" / "Dataset007_Small", num_cases=1)
    first = prepare(raw, plans, summary, tmp_path)
    other = copy.deepcopy(plans)
    other["configurations"]["3d_fullres"]["spacing"] = [2.0, 2.0, 2.0]
    second = prepare(raw, other, summary, tmp_path)
    image = raw / "imagesTr" / "patient_0_0000.nii.gz"
    os.utime(image, ns=(0, image.stat().st_mtime_ns + 1))
    third = prepare(raw, plans, summary, tmp_path)
    assert len({first, second, third}) == 3


def test_a_case_that_cannot_be_preprocessed_is_named_in_the_local_log_only(plans, summary, tmp_path):
    raw = write_dataset(tmp_path / "raw" / "Dataset007_Small", num_cases=2)
    (raw / "imagesTr" / "patient_1_0000.nii.gz").write_bytes(b"")
    with pytest.raises(DatasetError, match="1 of 2 at which it fails") as refusal:
        prepare(raw, plans, summary, tmp_path)
    assert "patient_1" in refusal.value.local_detail
    assert "patient" not in json.dumps(refusal.value.to_reply())


def test_a_second_process_waits_for_the_first(raw, plans, summary, tmp_path):
    (tmp_path / "plans.json").write_text(json.dumps(plans))
    (tmp_path / "fingerprint.json").write_text(json.dumps(summary.to_nnunet()))
    code = (
        "import json, sys; from pathlib import Path; from nnunet_flare.nnunet.preprocess import preprocess; "
        "raw, home = map(Path, sys.argv[1:]); "
        "plans, fingerprint = (json.loads((home / f).read_text()) for f in ('plans.json', 'fingerprint.json')); "
        "preprocess(raw, plans, fingerprint, '3d_fullres', preprocessed_root=home / 'federated', "
        "report=lambda *progress: print(*progress))"
    )
    command = [sys.executable, "-c", code, str(raw), str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0].split("\n") for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(len(output) - 1 for output in outputs) == [0, NUM_CASES]


def test_the_hospitals_own_split_is_kept_and_the_raw_folders_goes_first(plans, summary, tmp_path):
    raw = write_dataset(tmp_path / "raw" / "Dataset007_Small", num_cases=2)
    splits = [[{"train": ["patient_0"], "val": ["patient_1"]}], [{"train": ["patient_1"], "val": ["patient_0"]}]]
    plain = tmp_path / "nnUNet_preprocessed" / raw.name / "splits_final.json"
    plain.parent.mkdir(parents=True)
    for file, split in zip((plain, raw / plain.name), splits, strict=True):
        file.write_text(json.dumps(split))
        folder = prepare(raw, plans, summary, tmp_path / "nnUNet_preprocessed" / "federated")
        train, val = fold_cases(folder / raw.name, "nnUNetPlans_3d_fullres", 0)
        assert [{"train": train, "val": val}] == split


def test_folds_equal_those_of_nnunets_trainer(raw, plans, prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(raw.parent))
    monkeypatch.setenv("nnUNet_preprocessed", str(prepared))
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    folder, identifier = prepared / raw.name, "nnUNetPlans_3d_fullres"
    splits = folder / "splits_final.json"
    description = json.loads((raw / "dataset.json").read_text())
    for fold in (0, 4, 5, 7, "all"):
        splits.unlink(missing_ok=True)
        arguments = {**plans, "continue_training": False}, "3d_fullres", fold, description, torch.device("cpu")
        train, val = nnUNetTrainer(*arguments).do_split()
        written = splits.read_text() if splits.is_file() else None
        splits.unlink(missing_ok=True)
        got = fold_cases(folder, identifier, fold)
        assert [sorted(cases) for cases in got] == [sorted(cases) for cases in (train, val)]
        assert (json.loads(splits.read_text()) if splits.is_file() else None) == (written and json.loads(written))
        assert all(type(case) is str for cases in got for case in cases)


@pytest.mark.parametrize(
    ("num_cases", "splits", "message"),
    [
        (4, None, "at least 5 cases"),
        (2, [{"train": ["patient_0", "patient_1"], "val": []}], "2 and 0 cases in fold 0"),
        (2, [{"train": ["patient_0"], "val": ["patient_9"]}], "1 others in fold 0"),
    ],
)
def test_a_fold_without_cases_is_refused_with_a_remedy(tmp_path, num_cases, splits, message):
    for index in range(num_cases):
        for name in (f"patient_{index}.b2nd", f"patient_{index}_seg.b2nd"):
            (tmp_path / "data").mkdir(exist_ok=True)
            (tmp_path / "data" / name).touch()
    if splits is not None:
        (tmp_path / "splits_final.json").write_text(json.dumps(splits))
    with pytest.raises(DatasetError, match=message) as refusal:
        fold_cases(tmp_path, "data", 0)
    assert "fold all" in refusal.value.remedy
    assert "patient" not in json.dumps(refusal.value.to_reply())
