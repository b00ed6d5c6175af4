import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_flare.errors import DatasetError, UpdateError
from nnunet_flare.nnunet.dataset import RawDataset, find_dataset
from nnunet_flare.nnunet.schema import DatasetSchema, check_schemas_match, dataset_json

SCHEMA = DatasetSchema(
    channel_names={0: "T1", 1: "CT"},
    labels={"background": 0, "RV": 1, "MYO": 2},
    file_ending=".nii.gz",
    num_training=2,
)
REGIONS = replace(
    SCHEMA,
    labels={"background": 0, "whole": (1, 2), "core": 2, "ignore": 3},
    regions_class_order=(1, 2),
    overwrite_image_reader_writer="NibabelIO",
)


def write_dataset(folder: Path, schema: DatasetSchema = SCHEMA, cases=("patient_a", "patient_b"), **changes) -> Path:
    """Empty files: nothing in the module under test reads a voxel."""
    for sub_folder in ("imagesTr", "labelsTr"):
        (folder / sub_folder).mkdir(parents=True)
    for case in cases:
        for channel in schema.channel_names:
            (folder / "imagesTr" / f"{case}_{channel:04d}{schema.file_ending}").touch()
        (folder / "labelsTr" / f"{case}{schema.file_ending}").touch()
    (folder / "dataset.json").write_text(json.dumps(dataset_json(schema, len(cases)) | changes))
    return folder


def reject(folder: Path, *, field: str, found: str = "", case: str = "") -> DatasetError:
    with pytest.raises(DatasetError) as caught:
        RawDataset.read(folder)
    error = caught.value
    assert field in error.field
    assert found in error.found
    assert case in error.local_detail
    assert "patient_" not in str(error.to_reply())
    return error


@pytest.mark.parametrize("dataset", ["Dataset027_ACDC", 27, "27", "027"])
def test_a_data_set_is_found_by_name_and_by_id(tmp_path, dataset):
    for name in ("Dataset027_ACDC", "Dataset002_Heart", "Dataset270_Other"):
        (tmp_path / name).mkdir()
    assert find_dataset(tmp_path, dataset) == tmp_path / "Dataset027_ACDC"


@pytest.mark.parametrize("dataset", ["Dataset027", "../Dataset027_ACDC", "ACDC", 2, -27, ""])
def test_an_unknown_data_set_is_refused_without_telling_what_other_data_the_site_has(tmp_path, dataset):
    (tmp_path / "Dataset027_ACDC").mkdir()
    with pytest.raises(DatasetError) as caught:
        find_dataset(tmp_path, dataset)
    assert caught.value.found == "0 of that name among 1"
    assert str(tmp_path) not in str(caught.value)
    assert str(tmp_path) in caught.value.local_detail
    assert "Dataset027_ACDC" in caught.value.local_detail


def test_an_id_with_two_data_sets_is_refused_but_their_names_are_not(tmp_path):
    for name in ("Dataset027_ACDC", "Dataset027_Copy"):
        (tmp_path / name).mkdir()
    with pytest.raises(DatasetError, match="found 2 of that name"):
        find_dataset(tmp_path, 27)
    assert find_dataset(tmp_path, "Dataset027_Copy").name == "Dataset027_Copy"


def test_a_missing_raw_data_folder_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="found 0 of that name among 0"):
        find_dataset(tmp_path / "absent", 27)


@pytest.mark.parametrize("schema", [SCHEMA, REGIONS], ids=["labels", "regions"])
def test_reading_returns_what_was_written(tmp_path, schema):
    assert RawDataset.read(write_dataset(tmp_path, schema)).schema == schema


def test_the_cases_are_those_that_nnunet_finds(tmp_path):
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    write_dataset(tmp_path, cases=("patient_a", "patient_a_0001", "b.1"), numTraining=3)
    nnunet = get_filenames_of_train_images_and_targets(str(tmp_path))
    ours = RawDataset.read(tmp_path).cases
    assert {name: [list(map(str, case.images)), str(case.label)] for name, case in ours.items()} == {
        name: [files["images"], files["label"]] for name, files in nnunet.items()
    }


def test_cases_listed_in_dataset_json_are_used_instead_of_the_folders(tmp_path):
    write_dataset(tmp_path / "elsewhere")
    images = [f"../elsewhere/imagesTr/patient_a_{channel:04d}.nii.gz" for channel in (0, 1)]
    listing = {"patient_x": {"images": images, "label": str(tmp_path / "elsewhere/labelsTr/patient_a.nii.gz")}}
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps(dataset_json(SCHEMA, 1) | {"dataset": listing}))
    case = RawDataset.read(folder).cases["patient_x"]
    assert [path.resolve() for path in case.images] == sorted((tmp_path / "elsewhere/imagesTr").glob("patient_a_*"))
    case.label.unlink()
    reject(folder, field="dataset.json: dataset", found="1 of 1", case="patient_x")


@pytest.mark.parametrize("listing", [[], {"patient_x": "files"}, {"patient_x": {"images": [1], "label": "x"}}, {}])
def test_a_malformed_case_list_is_refused(tmp_path, listing):
    reject(write_dataset(tmp_path, dataset=listing), field="dataset.json: dataset")


def test_a_missing_dataset_json_is_refused(tmp_path):
    reject(tmp_path, field="dataset.json", found="no such file", case=str(tmp_path))


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b""])
def test_a_dataset_json_that_is_no_json_is_refused(tmp_path, text):
    (tmp_path / "dataset.json").write_bytes(text)
    reject(tmp_path, field="dataset.json", found="not JSON")


@pytest.mark.parametrize("key", ["channel_names", "labels", "numTraining", "file_ending"])
def test_a_missing_key_is_refused_by_name(tmp_path, key):
    document = dataset_json(SCHEMA, 2)
    del document[key]
    (tmp_path / "dataset.json").write_text(json.dumps(document))
    reject(tmp_path, field="dataset.json", found=f"no {key}")


def test_a_dataset_json_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "dataset.json").write_text("[]")
    reject(tmp_path, field="dataset.json")


def test_a_data_set_without_images_is_refused(tmp_path):
    reject(write_dataset(tmp_path, cases=(), numTraining=1), field="imagesTr", found="none")


def test_an_absent_image_folder_is_refused(tmp_path):
    write_dataset(tmp_path)
    (tmp_path / "imagesTr").rename(tmp_path / "elsewhere")
    reject(tmp_path, field="imagesTr", found="none")


def test_an_image_without_label_is_refused(tmp_path):
    write_dataset(tmp_path)
    (tmp_path / "labelsTr/patient_b.nii.gz").unlink()
    reject(tmp_path, field="labelsTr", found="1 case", case="patient_b")


def test_a_label_without_image_is_refused(tmp_path):
    write_dataset(tmp_path)
    (tmp_path / "labelsTr/patient_c.nii.gz").touch()
    reject(tmp_path, field="imagesTr", found="1 case", case="patient_c")


@pytest.mark.parametrize("lost", ["patient_b_0000.nii.gz", "patient_b_0001.nii.gz"])
def test_a_missing_channel_is_refused(tmp_path, lost):
    write_dataset(tmp_path)
    (tmp_path / "imagesTr" / lost).unlink()
    reject(tmp_path, field="imagesTr", found="1 case", case="patient_b")


@pytest.mark.parametrize("extra", ["patient_b_0002.nii.gz", "patient_b.nii.gz", "patient_b_01.nii.gz"])
def test_a_channel_too_many_or_a_file_without_channel_is_refused(tmp_path, extra):
    write_dataset(tmp_path)
    (tmp_path / "imagesTr" / extra).touch()
    reject(tmp_path, field="imagesTr", found="1 case", case="patient_b")


@pytest.mark.parametrize("twin", ["imagesTr/PATIENT_B_0000.nii.gz", "labelsTr/Patient_b.nii.gz"])
def test_cases_that_differ_in_letter_case_only_are_refused(tmp_path, twin):
    write_dataset(tmp_path)
    (tmp_path / twin).touch()
    reject(tmp_path, field=twin.split("/")[0], found="2 names", case="patient_b")


@pytest.mark.parametrize("twin", ["imagesTr/patient_b_0000.nii", "labelsTr/patient_b.nrrd"])
def test_a_case_in_two_formats_is_refused(tmp_path, twin):
    write_dataset(tmp_path)
    (tmp_path / twin).touch()
    reject(tmp_path, field=twin.split("/")[0], found="1 name", case="patient_b")


def test_other_files_beside_the_images_do_no_harm(tmp_path):
    write_dataset(tmp_path)
    for name in ("imagesTr/notes.txt", "imagesTr/patient_b.json", "labelsTr/.DS_Store"):
        (tmp_path / name).touch()
    assert RawDataset.read(tmp_path).schema == SCHEMA


def test_a_wrong_number_of_training_cases_is_refused(tmp_path):
    error = reject(write_dataset(tmp_path, numTraining=3), field="numTraining", found="3")
    assert error.expected == "2 cases"


def test_a_colour_image_stands_for_its_three_channels(tmp_path):
    colour = replace(SCHEMA, channel_names={0: "R", 1: "G", 2: "B"}, file_ending=".png")
    write_dataset(tmp_path, replace(colour, channel_names={0: "R"}), channel_names={"0": "R", "1": "G", "2": "B"})
    assert RawDataset.read(tmp_path).schema == colour


BAD_LABELS = [
    {"RV": 1},
    {"background": 1, "RV": 0},
    {"background": 0},
    {"background": 0, "RV": 2},
    {"background": 0, "RV": 1, "MYO": 3},
    {"background": 0, "RV": -1},
    {"background": 0, "RV": "1"},
    {"background": 0, "RV": 1.0},
    {"background": 0, "RV": True},
    {"background": 0, "RV": []},
    {"background": 0, "RV": 1, "ignore": 1},
    {"background": 0, "RV": 1, "ignore": 3},
    {"background": [0], "RV": 1},
    {"0": "background", "1": "RV"},
    ["background", "RV"],
]


@pytest.mark.parametrize("labels", BAD_LABELS, ids=str)
def test_labels_that_nnunet_cannot_train_on_are_refused(tmp_path, labels):
    reject(write_dataset(tmp_path, labels=labels), field="labels")


@pytest.mark.parametrize("order", [None, [1], [1, 2, 2], [1, 5], "12", [[1], [2]]], ids=str)
def test_regions_without_a_fitting_class_order_are_refused(tmp_path, order):
    reject(write_dataset(tmp_path, REGIONS, regions_class_order=order), field="regions_class_order")


@pytest.mark.parametrize("schema", [SCHEMA, REGIONS], ids=["labels", "regions"])
def test_the_labels_mean_to_us_what_they_mean_to_nnunet(schema):
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    document = dataset_json(schema, 2)
    manager = LabelManager(document["labels"], document.get("regions_class_order"))
    assert manager.has_regions == schema.has_regions
    assert manager.ignore_label == schema.ignore_label


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("channel_names", {}),
        ("channel_names", {"1": "T1", "2": "CT"}),
        ("channel_names", {"0": "T1", "1": ""}),
        ("channel_names", {"0": "T1", "one": "CT"}),
        ("channel_names", ["T1", "CT"]),
        ("file_ending", "nii.gz"),
        ("file_ending", "../x"),
        ("file_ending", None),
        ("overwrite_image_reader_writer", "os.system"),
        ("overwrite_image_reader_writer", 5),
    ],
)
def test_malformed_fields_are_refused_by_name(tmp_path, field, value):
    reject(write_dataset(tmp_path, **{field: value}), field=field)


@given(
    channels=st.lists(st.sampled_from(["MRI", "CT", "noNorm"]), min_size=1, max_size=4),
    num_labels=st.integers(1, 5),
    ignore=st.booleans(),
    num_training=st.integers(1, 10**6),
)
def test_a_schema_survives_the_journey_as_json(channels, num_labels, ignore, num_training):
    labels = {"background": 0} | {f"label {i}": i for i in range(1, num_labels + 1)}
    labels |= {"ignore": num_labels + 1} if ignore else {}
    schema = replace(SCHEMA, channel_names=dict(enumerate(channels)), labels=labels, num_training=num_training)
    assert DatasetSchema.from_json(json.loads(json.dumps(schema.to_json()))) == schema


def test_regions_survive_the_journey_as_json():
    assert DatasetSchema.from_json(json.loads(json.dumps(REGIONS.to_json()))) == REGIONS


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(field=st.sampled_from(sorted(SCHEMA.to_json())), garbage=JSON_VALUES)
def test_garbage_from_a_site_is_an_update_error_or_a_valid_schema(field, garbage):
    try:
        schema = DatasetSchema.from_json(SCHEMA.to_json() | {field: garbage})
    except UpdateError:
        return
    assert DatasetSchema.from_json(schema.to_json()) == schema


@given(JSON_VALUES)
def test_what_is_no_schema_at_all_is_an_update_error(garbage):
    with pytest.raises(UpdateError):
        DatasetSchema.from_json(garbage)


@pytest.mark.parametrize(
    "change", [{"labels": None}, {"num_training": 0}, {"num_training": True}, {"extra": 1}], ids=str
)
def test_a_schema_with_a_wrong_or_extra_field_is_an_update_error(change):
    with pytest.raises(UpdateError):
        DatasetSchema.from_json(SCHEMA.to_json() | change)


def test_schemas_of_different_size_match():
    check_schemas_match({"site-1": SCHEMA, "site-2": replace(SCHEMA, num_training=99)})


def test_the_order_of_plain_labels_does_not_matter():
    turned = replace(SCHEMA, labels=dict(reversed(SCHEMA.labels.items())))
    check_schemas_match({"site-1": SCHEMA, "site-2": turned})


@pytest.mark.parametrize(
    ("first", "change", "field", "expected", "found"),
    [
        (SCHEMA, {"channel_names": {0: "T2", 1: "CT"}}, "channel_names", "{0: 'T1'}", "{0: 'T2'}"),
        (SCHEMA, {"channel_names": {0: "T1"}}, "channel_names", "{1: 'CT'}", "{}"),
        (SCHEMA, {"labels": {"background": 0, "MYO": 1, "RV": 2}}, "labels", "'RV': 1", "'RV': 2"),
        (SCHEMA, {"labels": {"background": 0, "RV": 1, "Myo": 2}}, "labels", "'MYO': 2", "'Myo': 2"),
        (SCHEMA, {"labels": {**SCHEMA.labels, "ignore": 3}}, "labels", "{}", "{'ignore': 3}"),
        (SCHEMA, {"file_ending": ".nrrd"}, "file_ending", "'.nii.gz'", "'.nrrd'"),
        (
            SCHEMA,
            {"overwrite_image_reader_writer": "NibabelIO"},
            "overwrite_image_reader_writer",
            "None",
            "'NibabelIO'",
        ),
        (REGIONS, {"regions_class_order": (2, 1)}, "regions_class_order", "(1, 2)", "(2, 1)"),
        (REGIONS, {"labels": dict(reversed(REGIONS.labels.items()))}, "labels", "'whole'", "'core'"),
    ],
)
def test_a_differing_site_is_refused_with_both_values(first, change, field, expected, found):
    schemas = {"site-1": first, "site-2": first, "site-3": replace(first, **change)}
    with pytest.raises(DatasetError) as caught:
        check_schemas_match(schemas)
    error = caught.value
    assert error.site == "site-3"
    assert field in error.field
    assert expected in error.expected
    assert "site-1" in error.expected
    assert found in error.found


def test_the_model_folder_gets_no_description_and_no_case_list(tmp_path):
    write_dataset(tmp_path, description="patients of Dr X", licence="none", name="secret")
    assert dataset_json(RawDataset.read(tmp_path).schema, 7) == {
        "channel_names": {"0": "T1", "1": "CT"},
        "labels": {"background": 0, "RV": 1, "MYO": 2},
        "numTraining": 7,
        "file_ending": ".nii.gz",
    }


def test_the_modules_load_neither_torch_nor_nnunet():
    code = (
        "import sys, nnunet_flare.nnunet.dataset, nnunet_flare.nnunet.phantoms, nnunet_flare.nnunet.split\n"
        "assert not {'torch', 'nnunetv2', 'nvflare'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
