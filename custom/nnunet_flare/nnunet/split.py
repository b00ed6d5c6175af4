"""Split one data set into the data sets of several sites, to try a federation at a desk."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import SimpleITK

from nnunet_flare.errors import DatasetError
from nnunet_flare.nnunet.assignment import Assignment, config_error
from nnunet_flare.nnunet.dataset import COLOUR_ENDINGS, IMAGE_ENDINGS, Case, RawDataset, files_by_stem, pair_cases
from nnunet_flare.nnunet.nifti import check_complete
from nnunet_flare.nnunet.resample import label_changes, resample_case
from nnunet_flare.nnunet.schema import DATASET_FILE, DatasetSchema, dataset_json
from nnunet_flare.nnunet.site import SETTINGS_FILE

__all__ = ["split_dataset"]

T = TypeVar("T")
logger = logging.getLogger(__name__)


def split_dataset(
    source: Path | tuple[Path, Path],
    out: Path,
    *,
    assignment: Assignment,
    spacing_mm: Mapping[str, Sequence[float]] | None = None,
    name: str | None = None,
    dataset_id: int | None = None,
    channel_names: Mapping[int, str] | None = None,
    labels: Mapping[str, int | tuple[int, ...]] | None = None,
) -> dict[str, Path]:
    """Write one nnU-Net raw data set per site, and site settings that point to them.

    ``out`` becomes ``DatasetNNN_<name><site>/`` for each site, with consecutive ids, and ``nnunet_flare.json``.
    Files are hard links where the file system allows them; those of resampled sites are new.

    Args:
        source: A raw data set of nnU-Net, or a folder with ``images`` and ``labels``, or such a pair of folders, whose
            files have equal names in both.
        out: A folder that does not exist yet.
        assignment: Which site gets which case.
        spacing_mm: Site -> voxel spacing in x, y, z to resample its cases to.
        name: Name of the data set; None takes the source's.
        dataset_id: First id; None takes the source's, else 501.
        channel_names: Index -> name of the one channel, where the source has no ``dataset.json``.
        labels: Label name -> value, where the source has no ``dataset.json``.

    Returns:
        Site -> folder of its data set.

    Raises:
        ConfigError: ``out`` exists, or a setting does not fit the source.
        DatasetError: the source is incomplete, or an image cannot be read.
    """
    if out.exists():
        raise config_error("out", "a folder that does not exist", "an existing one", "choose another", [str(out)])
    raw = _open(source, channel_names, labels)
    folder_name = (source if isinstance(source, Path) else source[0].parent).absolute().name
    named = re.fullmatch(r"Dataset(\d{3})_(\w+)", folder_name)
    first_id = dataset_id if dataset_id is not None else int(named[1]) if named else 501
    name = _camel_case(name or (named[2] if named else folder_name))

    cases_of: dict[str, dict[str, Case]] = defaultdict(dict)
    for case, site in sorted(assignment.assign(raw.cases).items(), key=lambda item: (item[1], item[0])):
        cases_of[site][case] = raw.cases[case]
    if odd := [site for site in cases_of if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", site)]:
        raise config_error("site", "names of letters, digits, '-', '_' and '.'", ", ".join(map(repr, odd)))
    if not 1 <= first_id <= 1000 - len(cases_of):
        raise config_error("dataset_id", "ids from 1 to 999", f"{len(cases_of)} from {first_id} on")
    spacings = dict(spacing_mm or {})
    _check_spacings(spacings, cases_of, raw.schema)
    for site, cases in cases_of.items():
        for case in cases:
            _check_grids(case, cases[case], spacings.get(site))

    folders = {site: f"Dataset{first_id + i:03d}_{name}{_camel_case(site)}" for i, site in enumerate(cases_of)}
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=".") as scratch:
        building = Path(scratch, out.name)
        for site, cases in cases_of.items():
            _write_site(building / folders[site], site, cases, raw.schema, spacings.get(site))
        sites = {site: {"dataset": folder} for site, folder in folders.items()}
        settings = {"nnunet_raw": str(out.absolute()), "sites": sites}
        (building / SETTINGS_FILE).write_text(json.dumps(settings, indent=2))
        building.rename(out)
    return {site: out / folder for site, folder in folders.items()}


def _open(
    source: Path | tuple[Path, Path],
    channel_names: Mapping[int, str] | None,
    labels: Mapping[str, int | tuple[int, ...]] | None,
) -> RawDataset:
    described = isinstance(source, Path) and (source / DATASET_FILE).exists()
    if described != (channel_names is None and labels is None) or (channel_names is None) != (labels is None):
        found = f"a {DATASET_FILE} and names too" if described else "neither both names nor a description"
        raise config_error("channel_names, labels", f"both, or a source with {DATASET_FILE}", found)
    if described:
        return RawDataset.read(source)
    image_folder, label_folder = (source / "images", source / "labels") if isinstance(source, Path) else source
    names = [path.name for folder in (image_folder, label_folder) if folder.is_dir() for path in folder.iterdir()]
    endings = {next((ending for ending in IMAGE_ENDINGS if name.endswith(ending)), None) for name in names} - {None}
    if len(endings) != 1:
        detail = f"{image_folder}\n{label_folder}"
        raise DatasetError(
            field="images and labels",
            expected=f"files of one format among {', '.join(IMAGE_ENDINGS)}",
            found=", ".join(sorted(endings)) or "none",
            remedy="convert them",
            local_detail=detail,
        )
    (ending,) = endings
    images = {case: (path,) for case, path in files_by_stem(image_folder, ending).items()}
    cases = pair_cases(images, files_by_stem(label_folder, ending))
    schema = DatasetSchema(channel_names=channel_names, labels=labels, file_ending=ending, num_training=len(cases))
    return RawDataset(schema=schema, cases=cases)


def _check_spacings(spacings: Mapping[str, Sequence[float]], sites: Collection[str], schema: DatasetSchema) -> None:
    if unknown := sorted(set(spacings) - set(sites)):
        raise config_error("spacing_mm", f"sites among {', '.join(sites)}", ", ".join(unknown))
    for spacing in spacings.values():
        if not all(0 < value < float("inf") for value in spacing):
            raise config_error("spacing_mm", "lengths above 0", "x".join(map(str, spacing)))
    if spacings and schema.file_ending in (*COLOUR_ENDINGS, ".tiff"):
        raise config_error("spacing_mm", "images with a spacing in mm", f"{schema.file_ending} images")


def _check_grids(name: str, case: Case, spacing_mm: Sequence[float] | None) -> None:
    """Images and label map of a case must be readable and lie on one voxel grid."""
    grids = []
    for path in (*case.images, case.label):
        reader = SimpleITK.ImageFileReader()
        reader.SetFileName(str(path))
        _readable(name, reader.ReadImageInformation)
        _readable(name, partial(check_complete, path))
        grids.append((reader.GetSize(), reader.GetSpacing()))
    if any(size != grids[0][0] or not np.allclose(spacing, grids[0][1], rtol=1e-3) for size, spacing in grids):
        raise DatasetError(
            field="images and labels",
            expected="one size and spacing for all files of a case",
            found=" and ".join(sorted({f"{size} at {np.round(spacing, 3).tolist()} mm" for size, spacing in grids})),
            remedy="bring images and label map of the case onto one grid",
            local_detail=name,
        )
    if spacing_mm and len(spacing_mm) != len(grids[0][0]):
        raise config_error("spacing_mm", f"{len(grids[0][0])} lengths", f"{len(spacing_mm)}")


def _readable(name: str, read: Callable[[], T]) -> T:
    try:
        return read()
    except (RuntimeError, OSError, EOFError, zlib.error) as error:
        raise DatasetError(
            field="images and labels",
            expected="files that SimpleITK can read",
            found="one that it cannot",
            remedy="replace or remove the case",
            local_detail=f"{name}\n{error}",
        ) from error


def _write_site(
    folder: Path, site: str, cases: Mapping[str, Case], schema: DatasetSchema, spacing_mm: Sequence[float] | None
) -> None:
    for sub_folder in ("imagesTr", "labelsTr"):
        (folder / sub_folder).mkdir(parents=True)
    volumes = []
    for name, case in cases.items():
        images = [folder / "imagesTr" / f"{name}_{i:04d}{schema.file_ending}" for i in range(len(case.images))]
        targets = Case(images=tuple(images), label=folder / "labelsTr" / f"{name}{schema.file_ending}")
        if spacing_mm is None:
            files = dict(zip((*targets.images, targets.label), (*case.images, case.label), strict=True))
            sidecars = {
                target.with_name(f"{name}.json"): path.with_name(f"{name}.json") for target, path in files.items()
            }
            files |= {target: path for target, path in sidecars.items() if path.is_file()}  # spacing of TIFF cases
            for target, path in files.items():
                _link(path, target)
        else:
            volumes.append(_readable(name, partial(resample_case, case, targets, spacing_mm)))
    (folder / DATASET_FILE).write_text(json.dumps(dataset_json(schema, len(cases)), indent=2))
    logger.info("%s: %d cases in %s", site, len(cases), folder.name)
    for label, change in label_changes(volumes).items():
        logger.log(logging.WARNING if change.num_vanished else logging.INFO, "%s: label %g: %s", site, label, change)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _camel_case(name: str) -> str:
    """``site-1`` -> ``Site1``."""
    return "".join(word[0].upper() + word[1:] for word in re.findall("[A-Za-z0-9]+", name))
