import json

import numpy as np
import pytest
import SimpleITK

from nnunet_flare.errors import DatasetError
from nnunet_flare.nnunet import phantoms
from nnunet_flare.nnunet.dataset import RawDataset
from nnunet_flare.nnunet.demo import DEMO_DATASETS
from nnunet_flare.nnunet.extract import extract_summary
from nnunet_flare.nnunet.phantoms import LABELS, write_demo_dataset
from nnunet_flare.nnunet.plans import plan
from nnunet_flare.nnunet.schema import check_schemas_match

SITES = ("site-1", "site-2", "site-3", "Charité Berlin")


def images_of(folder):
    return [SimpleITK.ReadImage(case.images[0]) for case in RawDataset.read(folder).cases.values()]


def labels_of(folder):
    return [SimpleITK.ReadImage(case.label) for case in RawDataset.read(folder).cases.values()]


def pixels(image):
    return SimpleITK.GetArrayFromImage(image)


@pytest.mark.parametrize("dataset", DEMO_DATASETS)
def test_the_sites_data_sets_are_complete_and_share_one_schema(tmp_path, dataset):
    folders = {site: write_demo_dataset(tmp_path / site, site, num_cases=2, dataset=dataset) for site in SITES}
    assert {folder.name for folder in folders.values()} == {DEMO_DATASETS[dataset].folder}
    schemas = {site: RawDataset.read(folder).schema for site, folder in folders.items()}
    check_schemas_match(schemas)
    assert schemas["site-1"].labels == {"background": 0, "RV": 1, "MYO": 2, "LV": 3}


def test_the_data_sets_have_names_and_ids_of_their_own():
    assert len({demo.folder[: len("Dataset900")] for demo in DEMO_DATASETS.values()}) == len(DEMO_DATASETS)


@pytest.mark.parametrize("dataset", DEMO_DATASETS)
def test_nnunet_finds_no_fault_with_a_case(tmp_path, dataset):
    from nnunetv2.experiment_planning.verify_dataset_integrity import check_cases, verify_labels
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    folder = write_demo_dataset(tmp_path, "site-2", num_cases=2, dataset=dataset)
    reader = determine_reader_writer_from_dataset_json(json.loads((folder / "dataset.json").read_text()), verbose=False)
    assert reader.__name__ == {2: "NaturalImage2DIO", 3: "SimpleITKIO"}[DEMO_DATASETS[dataset].dimension]
    for case in RawDataset.read(folder).cases.values():
        assert verify_labels(str(case.label), reader, list(LABELS.values()))
        assert check_cases([str(case.images[0])], str(case.label), 1, reader)


@pytest.mark.parametrize("dataset", DEMO_DATASETS)
def test_a_site_gets_the_same_phantoms_again_and_another_site_gets_others(tmp_path, dataset):
    for root, site in (("a", "site-1"), ("b", "site-1"), ("c", "site-x"), ("d", "site-y")):
        write_demo_dataset(tmp_path / root, site, num_cases=2, dataset=dataset)
    contents = {
        root: [pixels(image).tobytes() for image in images_of(next((tmp_path / root).glob("Dataset*")))]
        for root in "abcd"
    }
    assert contents["a"] == contents["b"]
    assert len({image for images in contents.values() for image in images}) == 6


def test_more_cases_begin_with_the_same_cases(tmp_path):
    few = images_of(write_demo_dataset(tmp_path / "few", "site-1", num_cases=1))
    many = images_of(write_demo_dataset(tmp_path / "many", "site-1", num_cases=2))
    assert np.array_equal(pixels(few[0]), pixels(many[0]))


def test_the_sites_differ_in_spacing_contrast_and_noise(tmp_path):
    spacings, contrasts, noises = set(), [], []
    for site in SITES[:3]:
        folder = write_demo_dataset(tmp_path / site, site, num_cases=4)
        cases = list(zip(map(pixels, images_of(folder)), map(pixels, labels_of(folder)), strict=True))
        spacings |= {image.GetSpacing() for image in images_of(folder)}
        contrasts.append(np.mean([image[label == 3].mean() / image[label == 2].mean() for image, label in cases]))
        # neighbouring pixels of the left ventricle share everything but noise
        steps = [np.diff(image, axis=2)[(label[:, :, 1:] == 3) & (label[:, :, :-1] == 3)] for image, label in cases]
        level = np.mean([image[label == 3].mean() for image, label in cases])
        noises.append(np.median(np.abs(np.concatenate(steps))) / level)
    assert len(spacings) == 3
    for values in (contrasts, noises):
        low, middle, high = sorted(values)
        assert middle > 1.15 * low
        assert high > 1.15 * middle


@pytest.mark.parametrize("site", SITES)
def test_volumes_have_the_promised_size(tmp_path, site):
    for image in images_of(write_demo_dataset(tmp_path, site)):
        (nx, ny, nz), (sx, sy, sz) = image.GetSize(), image.GetSpacing()
        assert nx == ny
        assert 42 <= nx <= 54
        assert 9 <= nz <= 11
        assert sx == sy
        assert 1.7 < sx < 2.3
        assert 7.9 < sz < 10.1


@pytest.mark.parametrize("dataset", ["demo", "demo_mixed"])
@pytest.mark.parametrize("site", SITES)
def test_every_heart_is_anatomy(tmp_path, site, dataset):
    for label in map(pixels, labels_of(write_demo_dataset(tmp_path, site, dataset=dataset))):
        assert set(np.unique(label)) == {0, 1, 2, 3}
        assert not np.any(label[-1] == 1), "no right ventricle at the apex"
        assert np.count_nonzero(label[-2] > 0) < np.count_nonzero(label[0] > 0), "hearts taper"
        for slice_label in label:  # the left ventricle is enclosed by its muscle
            for axis in (0, 1):
                for step in (-1, 1):
                    touching = np.roll(slice_label, step, axis)[slice_label == 3]
                    assert set(np.unique(touching)) <= {2, 3}
        assert np.all(label[:, [0, -1], :] == 0), "the heart lies within the field of view"


@pytest.fixture(scope="module")
def own_plans(tmp_path_factory):
    """Site -> the configurations that nnU-Net plans from the fingerprint of the site's mixed data alone."""
    configurations = {}
    for site in SITES[:3]:
        folder = write_demo_dataset(tmp_path_factory.mktemp("raw"), site, dataset="demo_mixed")
        summary = extract_summary(folder, num_foreground_voxels=10_000, num_cases_total=8)
        plans = plan(folder, summary, num_training=8, configuration="3d_fullres", overrides={"batch_size": 2})
        configurations[site] = plans["configurations"]
    return configurations


def test_nnunet_plans_unlike_3d_networks_for_the_sites_of_the_mixed_demo(own_plans):
    plans = {site: configurations["3d_fullres"] for site, configurations in own_plans.items()}
    networks = {site: found["architecture"]["arch_kwargs"] for site, found in plans.items()}
    assert {site: found["patch_size"] for site, found in plans.items()} == {
        "site-1": [10, 40, 40],
        "site-2": [12, 28, 28],
        "site-3": [16, 24, 24],
    }
    assert {site: network["n_stages"] for site, network in networks.items()} == {"site-1": 4, "site-2": 3, "site-3": 3}
    assert {site: network["kernel_sizes"][0] for site, network in networks.items()} == {
        "site-1": [1, 3, 3],
        "site-2": [1, 3, 3],
        "site-3": [3, 3, 3],
    }


def test_nnunet_plans_unlike_2d_networks_for_the_sites_of_the_mixed_demo(own_plans):
    plans = [configurations["2d"] for configurations in own_plans.values()]
    assert [found["patch_size"] for found in plans] == [[40, 40], [28, 28], [24, 24]]
    assert [found["architecture"]["arch_kwargs"]["n_stages"] for found in plans] == [4, 3, 3]


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_the_networks_of_the_mixed_demo_agree_below_full_resolution(own_plans, configuration):
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    def coarse_layers(architecture):
        network = get_network_from_plans(*architecture.values(), 1, len(LABELS), allow_init=False)
        encoder, decoder = network.encoder.stages, network.decoder
        parts = encoder[1], encoder[2], decoder.stages[-2], decoder.transpconvs[-2]
        return [{name: tuple(tensor.shape) for name, tensor in part.state_dict().items()} for part in parts]

    first, *others = [coarse_layers(found[configuration]["architecture"]) for found in own_plans.values()]
    assert others == [first, first]


def test_an_ultrasound_image_is_black_outside_its_sector(tmp_path):
    folder = write_demo_dataset(tmp_path, "site-1", num_cases=2, dataset="demo_2d")
    for image, label in zip(map(pixels, images_of(folder)), map(pixels, labels_of(folder)), strict=True):
        assert image.dtype == np.uint8
        assert image.ndim == 2
        assert not image[0, 0]
        assert not image[0, -1]
        assert 0.3 < np.mean(image > 0) < 0.8
        assert set(np.unique(label)) == {0, 1, 2, 3}


def test_an_existing_data_set_is_returned_untouched(tmp_path):
    folder = write_demo_dataset(tmp_path, "site-1", num_cases=1)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert write_demo_dataset(tmp_path, "site-1", num_cases=1) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_two_sites_in_one_raw_data_folder_are_refused(tmp_path):
    write_demo_dataset(tmp_path, "site-1", num_cases=1)
    with pytest.raises(DatasetError, match="1 phantoms of site-2"):
        write_demo_dataset(tmp_path, "site-2", num_cases=1)


def test_another_number_of_cases_is_refused(tmp_path):
    write_demo_dataset(tmp_path, "site-1", num_cases=1)
    with pytest.raises(DatasetError, match="2 phantoms of site-1"):
        write_demo_dataset(tmp_path, "site-1", num_cases=2)


def test_a_crash_leaves_nothing_behind(tmp_path, monkeypatch):
    def crash(*_):
        raise RuntimeError("disk full")

    monkeypatch.setattr(phantoms, "dataset_json", crash)
    with pytest.raises(RuntimeError, match="disk full"):
        write_demo_dataset(tmp_path, "site-1", num_cases=1)
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_comes_second_takes_the_first_ones_data_set(tmp_path, monkeypatch):
    write = phantoms._write

    def overtaken(folder, *arguments):
        write(tmp_path / folder.name, *arguments)
        write(folder, *arguments)

    monkeypatch.setattr(phantoms, "_write", overtaken)
    folder = write_demo_dataset(tmp_path, "site-1", num_cases=1)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
