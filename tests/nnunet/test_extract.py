import json

import numpy as np
import pytest
import SimpleITK
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_flare.errors import ConfigError, DatasetError
from nnunet_flare.fingerprint.buckets import RELATIVE_ACCURACY
from nnunet_flare.fingerprint.summary import FingerprintSummary, merge_summaries
from nnunet_flare.nnunet.extract import extract_cases, extract_summary

NUM_VOXELS = 6000
EXTREMES = {"percentile_00_5", "median", "percentile_99_5"}


def write(file, array, spacing_mm):
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing([float(mm) for mm in reversed(spacing_mm)])
    file.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(image, str(file))


def write_case(folder, name, seed, channels=2, foreground=True, ending=".nii.gz"):
    rng = np.random.default_rng(seed)
    shape, spacing_mm = (12 + seed % 3, 20, 18 + seed % 4), (3.0 - 0.25 * (seed % 3), 1.0, 1.0 + 0.125 * (seed % 2))
    label = np.zeros(shape, np.uint8)
    if foreground:
        label[3:8, 5:15, 5:12], label[5:7, 8:12, 6:9] = 1, 2
    inside = np.zeros(shape, bool)
    inside[1 : -1 - seed % 3, 2 + seed % 2 : -2, 2:-2] = True
    for channel in range(channels):
        voxels = np.where(inside, rng.normal(50 * (label + 1) + seed, 10, shape), 0).astype(np.float32)
        write(folder / "imagesTr" / f"{name}_{channel:04d}{ending}", voxels, spacing_mm)
    write(folder / "labelsTr" / f"{name}{ending}", label, spacing_mm)


def write_dataset(folder, seeds, labels=None, channel_names=("CT", "MRI"), without_foreground=(), **more):
    ending = more.get("file_ending", ".nii.gz")
    for seed in seeds:
        write_case(folder, f"patient_{seed:02d}", seed, len(channel_names), seed not in without_foreground, ending)
    description = {
        "channel_names": dict(enumerate(channel_names)),
        "labels": labels or {"background": 0, "organ": 1, "lesion": 2},
        "numTraining": len(seeds),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description | more))
    return folder


@pytest.fixture(scope="module")
def pooled(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("pooled") / "Dataset001_Pooled", range(6), without_foreground={4})


@pytest.fixture
def dataset(tmp_path):
    return write_dataset(
        tmp_path / "Dataset002_Faulty", range(3), file_ending=".mha"
    )  # in NIfTI, SimpleITK reads NaN as 0


def extract(folder, num_cases_total, **options):
    return extract_summary(folder, num_foreground_voxels=NUM_VOXELS, num_cases_total=num_cases_total, **options)


def damage(folder, kind):
    label, image = folder / "labelsTr" / "patient_01.mha", folder / "imagesTr" / "patient_01_0001.mha"
    voxels = {
        file: SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file))).astype(float) for file in (label, image)
    }
    spacing_mm = SimpleITK.ReadImage(str(label)).GetSpacing()[::-1]
    match kind:
        case "image and label files":
            image.write_bytes(image.read_bytes()[:100])
        case "image voxels":
            voxels[image][4, 6, 6] = np.inf
            write(image, voxels[image], spacing_mm)
        case "label voxels":
            voxels[label][4, 6, 6] = np.nan
            write(label, voxels[label], spacing_mm)
        case "label values":
            voxels[label][4, 6, 6] = 7
            write(label, voxels[label], spacing_mm)
        case "label shape":
            write(label, voxels[label][1:], spacing_mm)
        case "label spacing":
            write(label, voxels[label], (9.0, 1.0, 1.0))


@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_summaries_of_sites_merge_to_what_nnunet_extracts_from_the_pooled_cases(
    pooled, tmp_path, monkeypatch, num_processes
):
    sites = [
        write_dataset(tmp_path / f"site{index}" / "Dataset003_Site", seeds, without_foreground={4})
        for index, seeds in enumerate(([0, 1, 2], [3], [4, 5]))
    ]
    merged = merge_summaries(extract(site, 6, num_processes=num_processes) for site in sites)
    assert merged == extract(pooled, 6)

    monkeypatch.setenv("nnUNet_raw", str(pooled.parent))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    extractor = DatasetFingerprintExtractor(pooled.name, num_processes=1)
    extractor.num_foreground_voxels_for_intensitystats, extractor.show_progress_bar = NUM_VOXELS, False
    extractor.run()
    expected = json.loads((tmp_path / pooled.name / "dataset_fingerprint.json").read_text())
    got = merged.to_nnunet()

    assert got.keys() == expected.keys()
    pairs = ("spacings", "shapes_after_crop")
    assert sorted(zip(*map(got.get, pairs), strict=True)) == sorted(zip(*map(expected.get, pairs), strict=True))
    key = "median_relative_size_after_cropping"
    assert got[key] == expected[key]
    properties = "foreground_intensity_properties_per_channel"
    assert got[properties].keys() == expected[properties].keys()
    for channel, statistics in expected[properties].items():
        assert got[properties][channel].keys() == statistics.keys()
        for name, value in statistics.items():
            accuracy = RELATIVE_ACCURACY if name in EXTREMES else 0 if name in ("min", "max") else 1e-6
            assert got[properties][channel][name] == pytest.approx(value, rel=accuracy, abs=0)


def test_each_image_and_label_is_read_once(dataset, monkeypatch):
    read = []
    original = SimpleITKIO.read_images
    monkeypatch.setattr(SimpleITKIO, "read_images", lambda self, files: read.extend(files) or original(self, files))
    summary = extract(dataset, 3)
    probe = read.pop(0)  # nnU-Net tries the first image to choose its reader
    assert probe.endswith("patient_00_0000.mha")
    assert len(read) == len(set(read)) == 3 * (2 + 1)
    assert summary.num_training == 3


def test_progress_is_reported_case_by_case(dataset):
    seen = []
    extract(dataset, 3, report=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_the_cases_of_a_site_add_up_to_its_summary(dataset):
    cases = dict(extract_cases(dataset, num_draws=NUM_VOXELS // 3))
    assert cases.keys() == {"patient_00", "patient_01", "patient_02"}
    assert merge_summaries(cases.values()) == extract(dataset, 3)
    assert all(isinstance(summary, FingerprintSummary) for summary in cases.values())


@pytest.mark.parametrize(
    "kind", ["image and label files", "image voxels", "label voxels", "label values", "label shape", "label spacing"]
)
def test_a_faulty_case_is_named_in_the_local_log_only(dataset, kind):
    damage(dataset, kind)
    with pytest.raises(DatasetError) as refusal:
        extract(dataset, 3)
    assert refusal.value.field == kind
    assert refusal.value.found.startswith("1 of 3 cases with ")
    assert "patient_01" in refusal.value.local_detail
    assert "patient" not in json.dumps(refusal.value.to_reply())


def test_a_file_with_several_channels_is_not_one_channel(dataset):
    file = dataset / "imagesTr" / "patient_02_0000.mha"
    image = SimpleITK.ReadImage(str(file))
    SimpleITK.WriteImage(SimpleITK.JoinSeries([image, image]), str(file))
    with pytest.raises(DatasetError, match="1 of 3 cases with"):
        extract(dataset, 3)


def test_all_faulty_cases_are_collected(dataset):
    damage(dataset, "label values")
    (dataset / "imagesTr" / "patient_00_0000.mha").write_bytes(b"the first file too, by which the reader is chosen")
    (dataset / "labelsTr" / "patient_02.mha").write_bytes(b"")
    with pytest.raises(DatasetError) as refusal:
        extract(dataset, 3)
    assert refusal.value.field == "image and label files; label values"
    assert refusal.value.found == "2 of 3 cases with unreadable files; 1 of 3 cases with other label values"
    assert all(f"patient_0{index}" in refusal.value.local_detail for index in range(3))


def test_regions_and_the_ignore_label_are_known_labels(tmp_path):
    labels = {"background": 0, "whole": [1], "both": [1], "ignore": 2}
    folder = write_dataset(tmp_path / "Dataset004_Ignore", [0], labels=labels)
    assert extract(folder, 1).channels[0].num_cases == 1
    regions = {"background": 0, "whole": [1, 2], "core": [2]}
    folder = write_dataset(tmp_path / "Dataset005_Regions", [0], labels=regions, regions_class_order=[1, 2])
    assert extract(folder, 1).channels[0].num_cases == 1


def test_fewer_voxels_than_cases_are_refused(dataset):
    with pytest.raises(ConfigError, match="num_foreground_voxels"):
        extract(dataset, NUM_VOXELS + 1)
