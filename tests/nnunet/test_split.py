import json
import logging
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import SimpleITK
from hypothesis import given
from hypothesis import strategies as st

from nnunet_flare.errors import ConfigError, DatasetError
from nnunet_flare.nnunet import split
from nnunet_flare.nnunet.assignment import FractionAssignment, TableAssignment, parse_fractions, parse_spacings
from nnunet_flare.nnunet.dataset import RawDataset
from nnunet_flare.nnunet.phantoms import write_demo_dataset
from nnunet_flare.nnunet.resample import resample_image, resample_labels
from nnunet_flare.nnunet.schema import DatasetSchema, dataset_json
from nnunet_flare.nnunet.site import SiteSettings
from nnunet_flare.nnunet.split import split_dataset

HALVES = FractionAssignment(fractions={"site-1": 0.5, "site-2": 0.5})
CASES = [f"phantom_{index:03d}" for index in range(8)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return write_demo_dataset(tmp_path_factory.mktemp("raw"), "site-1")


def table(folder, text):
    (folder / "assignment.csv").write_text(text)
    return TableAssignment(file=folder / "assignment.csv")


def cases_of(folder):
    return set(RawDataset.read(folder).cases)


def write_pair(root, cases, ending=".nii.gz"):
    array = np.zeros((4, 5, 6), np.uint8)
    array[1:3, 1:3, 1:4] = 1
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
        for case in cases:
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), root / folder / f"{case}{ending}")
    return {"channel_names": {0: "MRI"}, "labels": {"background": 0, "organ": 1}}


def refuse_table(tmp_path, text, found, detail=""):
    with pytest.raises(ConfigError) as caught:
        table(tmp_path, text).assign(["p1", "p2"])
    assert found in caught.value.found
    assert detail in caught.value.local_detail
    assert "p1" not in str(caught.value.to_reply())


def test_a_table_sends_each_case_where_it_says(tmp_path):
    assignment = table(tmp_path, "\ufeffcase,site\np1, site-2 \n\np2,site-1\n")
    assert assignment.assign(["p2", "p1"]) == {"p1": "site-2", "p2": "site-1"}


def test_a_table_with_an_unknown_case_is_refused(tmp_path):
    refuse_table(tmp_path, "case,site\np1,a\np2,a\np9,a\n", "1 cases that the data set does not have", "p9")


def test_a_table_without_a_case_is_refused(tmp_path):
    refuse_table(tmp_path, "case,site\np1,a\n", "1 cases of the data set that are not listed", "p2")


def test_a_table_with_a_case_twice_is_refused(tmp_path):
    refuse_table(tmp_path, "case,site\np1,a\np2,a\np1,b\n", "1 cases that are listed twice", "p1")


@pytest.mark.parametrize("text", ["", "site,case\na,p1\n", "p1,a\np2,b\n", "case;site\np1;a\n"])
def test_a_table_without_the_header_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match="header case,site"):
        table(tmp_path, text).assign(["p1", "p2"])


@pytest.mark.parametrize("row", ["p2", "p2,", "p2,a,b"])
def test_a_table_with_an_odd_row_is_refused(tmp_path, row):
    refuse_table(tmp_path, f"case,site\np1,a\n{row}\n", "rows with more or less")


def test_an_absent_table_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        TableAssignment(file=tmp_path / "absent.csv").assign(["p1"])


@given(
    weights=st.lists(st.integers(1, 50), min_size=1, max_size=6), num_cases=st.integers(0, 200), seed=st.integers(0, 9)
)
def test_every_case_lands_somewhere_and_no_share_is_off_by_a_case(weights, num_cases, seed):
    fractions = {f"site-{i}": Fraction(weight, sum(weights)) for i, weight in enumerate(weights)}
    cases = [f"p{i}" for i in range(num_cases)]
    try:
        sites = FractionAssignment(fractions=fractions, seed=seed).assign(cases)
    except ConfigError:
        assert min(fractions.values()) * num_cases < 1, "a site may only stay empty if its share is below a case"
        return
    assert sorted(sites) == sorted(cases)
    counts = Counter(sites.values())
    assert all(abs(counts[site] - fractions[site] * num_cases) < 1 for site in fractions)


def test_fractions_may_be_floats_and_need_no_exact_sum():
    thirds = FractionAssignment(fractions={"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})
    assert Counter(thirds.assign([f"p{i}" for i in range(9)]).values()) == {"a": 3, "b": 3, "c": 3}


def test_the_seed_decides_and_the_order_of_cases_does_not():
    def assigned(cases, seed):
        return FractionAssignment(fractions={"a": 0.5, "b": 0.5}, seed=seed).assign(cases)

    cases = [f"p{i}" for i in range(20)]
    assert assigned(cases, 1) == assigned(cases[::-1], 1)
    assert assigned(cases, 1) != assigned(cases, 2)


@pytest.mark.parametrize("fractions", [{"a": 0.5, "b": 0.4}, {"a": 0.6, "b": 0.6}, {"a": 1.5, "b": -0.5}, {}], ids=str)
def test_fractions_that_do_not_sum_to_1_are_refused(fractions):
    with pytest.raises(ConfigError, match="sum to 1"):
        FractionAssignment(fractions=fractions).assign(["p1", "p2"])


def test_a_site_with_no_case_is_refused():
    with pytest.raises(ConfigError, match="none for b of 3"):
        FractionAssignment(fractions={"a": 0.95, "b": 0.05}).assign(["p1", "p2", "p3"])


def test_all_cases_of_a_patient_go_to_one_site():
    cases = [f"p{patient}_frame{frame}" for patient in range(6) for frame in range(1 + patient % 3)]
    sites = FractionAssignment(fractions={"a": 0.5, "b": 0.5}, patient_pattern=r"^(p\d+)_").assign(cases)
    assert sorted(sites) == sorted(cases)
    by_patient = {case.split("_")[0]: set() for case in cases}
    for case, site in sites.items():
        by_patient[case.split("_")[0]].add(site)
    assert Counter(site for (site,) in by_patient.values()) == {"a": 3, "b": 3}


def test_a_pattern_that_does_not_match_all_cases_is_refused():
    with pytest.raises(ConfigError) as caught:
        FractionAssignment(fractions={"a": 1}, patient_pattern=r"(p\d)").assign(["p1", "q2"])
    assert caught.value.found == "1 of 2 without"
    assert caught.value.local_detail == "q2"


@pytest.mark.parametrize("pattern", [r"p\d", r"(p)(\d)", "(p"])
def test_a_pattern_without_exactly_one_group_is_refused(pattern):
    with pytest.raises(ConfigError, match="patient_pattern"):
        FractionAssignment(fractions={"a": 1}, patient_pattern=pattern).assign(["p1"])


def test_options_are_read_as_users_write_them():
    assert parse_fractions(" site-1=0.7, site-2=0.3") == {"site-1": Fraction(7, 10), "site-2": Fraction(3, 10)}
    assert parse_spacings("a=1x1x2,b=1.5x1.5") == {"a": (1.0, 1.0, 2.0), "b": (1.5, 1.5)}


@pytest.mark.parametrize("text", ["", "a", "a=", "=1", "a=x", "a=1/0", "a=1,a=1", "a=1,"])
def test_fractions_that_cannot_be_read_are_refused(text):
    with pytest.raises(ConfigError, match="fractions"):
        parse_fractions(text)


@pytest.mark.parametrize("text", ["a", "a=1xx2", "a=1,2"])
def test_spacings_that_cannot_be_read_are_refused(text):
    with pytest.raises(ConfigError, match="spacing"):
        parse_spacings(text)


def test_a_split_is_a_partition_into_valid_data_sets(demo, tmp_path):
    folders = split_dataset(demo, tmp_path / "out", assignment=HALVES)
    assert {site: folder.name for site, folder in folders.items()} == {
        "site-1": "Dataset900_DemoSite1",
        "site-2": "Dataset901_DemoSite2",
    }
    assert cases_of(folders["site-1"]) | cases_of(folders["site-2"]) == set(CASES)
    assert not cases_of(folders["site-1"]) & cases_of(folders["site-2"])
    source = RawDataset.read(demo).schema
    for folder in folders.values():
        assert RawDataset.read(folder).schema.num_training == 4
        assert RawDataset.read(folder).schema.labels == source.labels
        for path in folder.glob("*Tr/*"):
            assert path.read_bytes() == (demo / path.relative_to(folder)).read_bytes()


def test_the_site_settings_find_their_data_sets(demo, tmp_path):
    folders = split_dataset(demo, tmp_path / "out", assignment=HALVES)
    for site, folder in folders.items():
        settings = SiteSettings.load(site, tmp_path / "out")
        assert settings.raw_root / settings.dataset == folder


def test_files_are_copied_where_links_are_impossible(demo, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("cross-device link")

    monkeypatch.setattr(split.os, "link", refuse)
    folders = split_dataset(demo, tmp_path / "out", assignment=HALVES)
    assert sum(len(cases_of(folder)) for folder in folders.values()) == 8


def test_the_spacing_files_of_tiff_cases_come_along(tmp_path):
    source = tmp_path / "Dataset007_Tiff"
    stack = SimpleITK.GetImageFromArray(np.zeros((4, 5, 6), np.uint8))
    for folder, names in (("imagesTr", ("p1_0000", "p1_0001")), ("labelsTr", ("p1",))):
        (source / folder).mkdir(parents=True)
        (source / folder / "p1.json").write_text('{"spacing": [3, 1, 1]}')
        for name in names:
            SimpleITK.WriteImage(stack, source / folder / f"{name}.tif")
    schema = DatasetSchema(
        channel_names={0: "a", 1: "b"}, labels={"background": 0, "organ": 1}, file_ending=".tif", num_training=1
    )
    (source / "dataset.json").write_text(json.dumps(dataset_json(schema, 1)))
    folders = split_dataset(source, tmp_path / "out", assignment=FractionAssignment(fractions={"a": 1}))
    relative = {str(path.relative_to(source)) for path in source.rglob("*")}
    assert {str(path.relative_to(folders["a"])) for path in folders["a"].rglob("*")} == relative


def test_a_pair_of_folders_becomes_a_data_set(tmp_path):
    names = write_pair(tmp_path / "my organ", ["p1", "p2"])
    folders = split_dataset(tmp_path / "my organ", tmp_path / "a", assignment=HALVES, **names)
    assert {folder.name for folder in folders.values()} == {"Dataset501_MyOrganSite1", "Dataset502_MyOrganSite2"}
    pair = (tmp_path / "my organ/images", tmp_path / "my organ/labels")
    again = split_dataset(pair, tmp_path / "b", assignment=HALVES, name="organ", dataset_id=7, **names)
    assert again["site-2"].name == "Dataset008_OrganSite2"
    assert RawDataset.read(again["site-2"]).schema.labels == names["labels"]


def test_a_pair_without_names_or_a_data_set_with_other_names_is_refused(demo, tmp_path):
    names = write_pair(tmp_path, ["p1", "p2"])
    for source, given_names in ((tmp_path, {}), (tmp_path, {"labels": names["labels"]}), (demo, names)):
        with pytest.raises(ConfigError, match="channel_names, labels"):
            split_dataset(source, tmp_path / "out", assignment=HALVES, **given_names)


def test_a_pair_with_a_lonely_image_is_refused(tmp_path):
    names = write_pair(tmp_path, ["p1", "p2"])
    (tmp_path / "labels/p2.nii.gz").unlink()
    with pytest.raises(DatasetError, match="1 cases without a file in labelsTr"):
        split_dataset(tmp_path, tmp_path / "out", assignment=HALVES, **names)


def test_a_pair_in_two_formats_is_refused(tmp_path):
    names = write_pair(tmp_path, ["p1", "p2"])
    for folder in ("images", "labels"):
        (tmp_path / folder / "p2.nii.gz").rename(tmp_path / folder / "p2.nii")
    with pytest.raises(DatasetError, match=r"found \.nii, \.nii\.gz"):
        split_dataset(tmp_path, tmp_path / "out", assignment=HALVES, **names)


def test_a_pair_that_is_not_there_is_refused(tmp_path):
    names = {"channel_names": {0: "MRI"}, "labels": {"background": 0, "organ": 1}}
    with pytest.raises(DatasetError, match="found none"):
        split_dataset(tmp_path / "absent", tmp_path / "out", assignment=HALVES, **names)


def test_an_existing_folder_is_never_overwritten(demo, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="out: expected a folder that does not exist"):
        split_dataset(demo, tmp_path / "out", assignment=HALVES)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("folder", ["images", "labels"])
@pytest.mark.parametrize("spacing_mm", [None, {"site-1": (2, 2, 2), "site-2": (2, 2, 2)}])
def test_an_unreadable_image_is_refused_and_nothing_is_left_behind(tmp_path, folder, spacing_mm):
    names = write_pair(tmp_path / "source", ["p1", "p2"])
    (tmp_path / "source" / folder / "p2.nii.gz").write_text("no image")
    with pytest.raises(DatasetError, match="SimpleITK can read") as caught:
        split_dataset(tmp_path / "source", tmp_path / "out", assignment=HALVES, spacing_mm=spacing_mm, **names)
    assert "p2" in caught.value.local_detail
    assert "p2" not in str(caught.value.to_reply())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_truncated_image_is_refused_although_simpleitk_reads_it(tmp_path):
    names = write_pair(tmp_path, ["p1", "p2"])
    noise = np.random.default_rng(0).integers(0, 255, (20, 20, 20)).astype(np.uint8)
    for folder in ("images", "labels"):
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(noise), tmp_path / folder / "p2.nii.gz")
    file = tmp_path / "images/p2.nii.gz"
    file.write_bytes(file.read_bytes()[:-2000])
    assert SimpleITK.ReadImage(file).GetSize() == (20, 20, 20)
    with pytest.raises(DatasetError, match="SimpleITK can read"):
        split_dataset(tmp_path, tmp_path / "out", assignment=HALVES, **names)


def test_an_image_and_a_label_map_on_different_grids_are_refused(tmp_path):
    names = write_pair(tmp_path, ["p1", "p2"])
    label = SimpleITK.ReadImage(tmp_path / "labels/p1.nii.gz")
    label.SetSpacing((1, 1, 2))
    SimpleITK.WriteImage(label, tmp_path / "labels/p1.nii.gz")
    with pytest.raises(DatasetError, match="one size and spacing"):
        split_dataset(tmp_path, tmp_path / "out", assignment=HALVES, **names)


@pytest.mark.parametrize("site", ["../site", "site 1", "-x"])
def test_a_site_name_that_is_no_folder_name_is_refused(demo, tmp_path, site):
    with pytest.raises(ConfigError, match="site"):
        split_dataset(demo, tmp_path / "out", assignment=FractionAssignment(fractions={site: 1}))


@pytest.mark.parametrize("dataset_id", [0, 999, -1])
def test_ids_outside_of_nnunets_range_are_refused(demo, tmp_path, dataset_id):
    with pytest.raises(ConfigError, match="dataset_id"):
        split_dataset(demo, tmp_path / "out", assignment=HALVES, dataset_id=dataset_id)


@pytest.mark.parametrize("spacing_mm", [{"site-9": (1, 1, 1)}, {"site-1": (1, 1)}, {"site-1": (1, 1, 0)}], ids=str)
def test_a_spacing_that_fits_no_site_or_no_image_is_refused(demo, tmp_path, spacing_mm):
    with pytest.raises(ConfigError, match="spacing_mm"):
        split_dataset(demo, tmp_path / "out", assignment=HALVES, spacing_mm=spacing_mm)


def test_images_without_spacing_are_not_resampled(tmp_path):
    ultrasound = write_demo_dataset(tmp_path, "site-1", num_cases=2, dataset="demo_2d")
    with pytest.raises(ConfigError, match="spacing in mm"):
        split_dataset(ultrasound, tmp_path / "out", assignment=HALVES, spacing_mm={"site-1": (2, 2)})
    assert split_dataset(ultrasound, tmp_path / "out", assignment=HALVES).keys() == {"site-1", "site-2"}


def test_only_the_site_asked_for_is_resampled_and_its_label_volumes_are_reported(demo, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folders = split_dataset(demo, tmp_path / "out", assignment=HALVES, spacing_mm={"site-2": (3, 3, 10)})
    spacing = {site: SimpleITK.ReadImage(next(f.glob("imagesTr/*"))).GetSpacing() for site, f in folders.items()}
    assert spacing == {"site-1": (2, 2, 10), "site-2": (3, 3, 10)}
    assert RawDataset.read(folders["site-2"]).schema.num_training == 4
    assert [record.args[1] for record in caplog.records if "label" in record.msg] == [1, 2, 3]
    assert "phantom_" not in caplog.text


def test_a_structure_that_vanishes_is_reported_as_a_warning(tmp_path, caplog):
    names = write_pair(tmp_path, ["p1", "p2"])
    label = SimpleITK.ReadImage(tmp_path / "labels/p1.nii.gz")
    label[:] = 0
    label[1, 1, 1] = 1  # no new voxel is filled by it to one half
    SimpleITK.WriteImage(label, tmp_path / "labels/p1.nii.gz")
    assignment = FractionAssignment(fractions={"site-1": 1})
    split_dataset(tmp_path, tmp_path / "out", assignment=assignment, spacing_mm={"site-1": (1.2, 1.2, 1.2)}, **names)
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "vanished from 1 of 2 cases" in warning.getMessage()


def volume(array, spacing=(1.0, 1.0, 1.0)):
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin((5.0, -7.0, 11.0))
    image.SetDirection((-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0))
    return image


def centre(image):
    return image.TransformContinuousIndexToPhysicalPoint([(size - 1) / 2 for size in image.GetSize()])


@pytest.mark.parametrize("spacing", [(1, 1, 2), (1.5, 1.5, 1.5), (0.7, 2, 1)])
@pytest.mark.parametrize("resample", [resample_image, resample_labels])
def test_resampling_keeps_the_centre_the_extent_and_the_orientation(resample, spacing):
    image = volume(np.ones((12, 13, 14), np.uint8))
    resampled = resample(image, spacing)
    assert resampled.GetSpacing() == pytest.approx(spacing)
    assert resampled.GetDirection() == image.GetDirection()
    assert centre(resampled) == pytest.approx(centre(image))
    extents = np.array(resampled.GetSize()) * spacing
    assert np.all(np.abs(extents - image.GetSize()) <= np.array(spacing) / 2 + 1e-9)
    assert np.allclose(SimpleITK.GetArrayFromImage(resampled), 1), "a constant stays constant up to the border"


def test_a_ramp_sampled_more_coarsely_is_the_mean_of_its_voxels():
    ramp = np.broadcast_to(np.arange(32.0), (4, 4, 32))
    resampled = SimpleITK.GetArrayFromImage(resample_image(volume(ramp.copy()), (2, 1, 1)))
    expected = ramp.reshape(4, 4, 16, 2).mean(axis=3)
    assert np.allclose(resampled[:, :, 3:-3], expected[:, :, 3:-3], atol=1e-3)


def test_detail_finer_than_the_new_voxels_is_smoothed_away_instead_of_aliased():
    stripes = np.zeros((4, 4, 60))
    stripes[:, :, ::2] = 100.0
    resampled = SimpleITK.GetArrayFromImage(resample_image(volume(stripes), (3, 1, 1)))[:, :, 3:-3]
    assert stripes.reshape(4, 4, 20, 3)[..., 1].std() == 50, "sampling without smoothing would keep all contrast"
    assert resampled.std() < 4
    assert resampled.mean() == pytest.approx(50, abs=2)


def test_interpolation_never_leaves_the_range_of_the_image():
    step = np.zeros((6, 6, 20))
    step[:, :, 10:] = 100.0
    resampled = SimpleITK.GetArrayFromImage(resample_image(volume(step), (0.4, 1, 1)))
    assert resampled.min() == 0
    assert resampled.max() == 100


def test_labels_on_finer_slices_are_the_old_labels_repeated():
    labels = np.random.default_rng(0).integers(0, 4, (5, 6, 7)).astype(np.uint8)
    resampled = resample_labels(volume(labels), (1, 1, 0.5))
    assert np.array_equal(SimpleITK.GetArrayFromImage(resampled), labels.repeat(2, axis=0))
    assert resampled.GetPixelID() == SimpleITK.sitkUInt8


def test_a_ball_keeps_its_volume_within_some_percent():
    z, y, x = np.mgrid[:40, :40, :40] - 19.5
    ball = (np.sqrt(x**2 + y**2 + z**2) < 12).astype(np.float32)
    resampled = resample_labels(volume(ball), (1.5, 1.5, 2))
    after = SimpleITK.GetArrayFromImage(resampled).sum() * 1.5 * 1.5 * 2
    assert after == pytest.approx(4 / 3 * np.pi * 12**3, rel=0.03)
    assert set(np.unique(SimpleITK.GetArrayFromImage(resampled))) == {0, 1}


@pytest.mark.parametrize("size", [20, 21])
def test_halving_the_slices_neither_grows_nor_shrinks_structures(size):
    labels = np.zeros((size, 8, 8), np.uint8)
    for first, last in ((2, 5), (7, 11), (14, 17)):  # odd and even borders, where new voxels are half inside
        labels[first:last] = 1
    resampled = SimpleITK.GetArrayFromImage(resample_labels(volume(labels), (1, 1, 2)))
    assert resampled.sum() * 2 == pytest.approx(labels.sum(), rel=0.2)


def test_the_settings_file_holds_nothing_but_sites_and_data_sets(demo, tmp_path):
    split_dataset(demo, tmp_path / "out", assignment=HALVES)
    assert json.loads((tmp_path / "out/nnunet_flare.json").read_text()) == {
        "nnunet_raw": str(tmp_path / "out"),
        "sites": {"site-1": {"dataset": "Dataset900_DemoSite1"}, "site-2": {"dataset": "Dataset901_DemoSite2"}},
    }
