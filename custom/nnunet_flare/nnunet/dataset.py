"""nnU-Net's raw data set: which cases it holds, and what it says about itself.

Nothing here reads a voxel. Case names go into ``local_detail`` only: they may identify patients.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_flare.errors import DatasetError
from nnunet_flare.nnunet.schema import DATASET_FILE, DatasetSchema, fault, schema_from

__all__ = ["Case", "RawDataset", "files_by_stem", "find_dataset", "pair_cases"]

IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl", ".png", ".bmp", ".tif", ".tiff")
COLOUR_ENDINGS = (".png", ".bmp", ".tif")  # nnU-Net reads the colours of one such file as 3 or 4 channels
_DATASET_NAME = re.compile(r"Dataset(\d{3})_\w+")
_REQUIRED_KEYS = ("channel_names", "file_ending", "labels", "numTraining")


def find_dataset(raw_root: Path, dataset: str | int) -> Path:
    """Folder of a data set, by its name (``Dataset027_ACDC``) or id (``27``, ``"027"``), never by a path.

    Raises:
        DatasetError: no folder of ``raw_root``, or more than one, has this name or id.
    """
    folders = sorted(raw_root.iterdir()) if raw_root.is_dir() else []
    ids = {folder: int(match[1]) for folder in folders if (match := _DATASET_NAME.fullmatch(folder.name))}
    wanted_id = int(dataset) if str(dataset).isdecimal() else None
    chosen = [folder for folder in ids if folder.is_dir() and (folder.name == dataset or ids[folder] == wanted_id)]
    if len(chosen) != 1:
        raise DatasetError(
            field="dataset",
            expected=f"one data set {dataset!r} in nnU-Net's raw data folder",
            found=f"{len(chosen)} of that name among {len(ids)}",
            remedy="name one that is there, or correct nnunet_raw in the site's settings",
            local_detail=f"raw data folder: {raw_root}; data sets: {', '.join(folder.name for folder in ids)}",
        )
    return chosen[0]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Files of one training case: an image per channel (or one colour image), and the label map."""

    images: tuple[Path, ...]
    label: Path


@dataclass(frozen=True, kw_only=True)
class RawDataset:
    """The schema and the training cases (case name -> files) behind it; the latter stay at the site."""

    schema: DatasetSchema
    cases: Mapping[str, Case]

    @classmethod
    def read(cls, folder: Path) -> RawDataset:
        """Read ``dataset.json`` and list its cases: those it names itself, else the files of its folders.

        Raises:
            DatasetError: ``dataset.json`` is missing, malformed or at odds with the files, or a case lacks an image,
                a channel or a label, or exists twice.
        """
        document = _read_document(folder / DATASET_FILE)
        schema = schema_from(document, num_training=document["numTraining"])
        if "dataset" in document:
            cases = _listed_cases(folder, document["dataset"], schema.file_ending)
        else:
            images = _channels_by_case(files_by_stem(folder / "imagesTr", schema.file_ending))
            cases = pair_cases(images, files_by_stem(folder / "labelsTr", schema.file_ending))
        channels = len(schema.channel_names)
        colour = channels in (3, 4) and schema.file_ending in COLOUR_ENDINGS
        odd = [
            name
            for name, case in cases.items()
            if len(case.images) != channels and not (colour and len(case.images) == 1)
        ]
        if odd:
            raise fault(
                "imagesTr", f"{channels} channels in each case", f"{len(odd)} cases with other channels", cases=odd
            )
        if schema.num_training != len(cases):
            remedy = "correct numTraining: nnU-Net limits the batch size by it"
            raise fault(f"{DATASET_FILE}: numTraining", f"{len(cases)} cases", str(schema.num_training), remedy)
        return cls(schema=schema, cases=cases)


def files_by_stem(folder: Path, ending: str) -> dict[str, Path]:
    """Files of ``folder`` that end in ``ending``: name without the ending -> path, sorted by name.

    Raises:
        DatasetError: there is none, or two files stand for one name: they differ in letter case only, or one of
            them is in another image format.
    """
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    files = {path.name.removesuffix(ending): path for path in paths if path.name.endswith(ending)}
    if not files:
        raise fault(folder.name, f"{ending} files", "none", "check the folder and file_ending", cases=[str(folder)])
    other_ending = re.compile("|".join(f"(?:{re.escape(other)})$" for other in IMAGE_ENDINGS if other != ending))
    stems = Counter(stem.casefold() for stem in files)
    stems.update(other_ending.sub("", path.name).casefold() for path in paths if not path.name.endswith(ending))
    if twins := [stem for stem in files if stems[stem.casefold()] > 1]:
        raise fault(folder.name, "one file for each case", f"{len(twins)} names with two", "keep one", cases=twins)
    return files


def pair_cases(images: Mapping[str, Sequence[Path]], labels: Mapping[str, Path]) -> dict[str, Case]:
    """Cases by name.

    Raises:
        DatasetError: an image has no label, or a label no image.
    """
    for field, missing in (("labelsTr", images.keys() - labels), ("imagesTr", labels.keys() - images)):
        if missing:
            found = f"{len(missing)} cases without a file in {field}"
            raise fault(field, "an image and a label for each case", found, cases=missing)
    return {name: Case(images=tuple(images[name]), label=labels[name]) for name in images}


def _channels_by_case(files: Mapping[str, Path]) -> dict[str, tuple[Path, ...]]:
    """Group the files of ``imagesTr`` (``<case>_0000``, ``<case>_0001``, ...) by case, in order of channel."""
    numbers: dict[str, list[int]] = defaultdict(list)
    for stem in files:
        match = re.fullmatch(r"(.+)_(\d{4})", stem)
        numbers[match[1] if match else stem].append(int(match[2]) if match else -1)
    if odd := [case for case, found in numbers.items() if found != list(range(len(found)))]:
        expected = "files <case>_0000, <case>_0001, ... for channels 0, 1, ..."
        raise fault("imagesTr", expected, f"{len(odd)} cases with other file names", cases=odd)
    return {case: tuple(files[f"{case}_{number:04d}"] for number in found) for case, found in numbers.items()}


def _listed_cases(folder: Path, listing: Any, ending: str) -> dict[str, Case]:
    """Cases that ``dataset.json`` names itself, with paths relative to it or absolute, as nnU-Net resolves them."""

    def resolve(path: str) -> Path:
        return folder.absolute() / os.path.expandvars(path)

    try:
        cases = {
            str(name): Case(images=tuple(map(resolve, files["images"])), label=resolve(files["label"]))
            for name, files in listing.items()
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise fault(f"{DATASET_FILE}: dataset", "images and label of each case", "another form") from error
    files = {name: (*case.images, case.label) for name, case in cases.items()}
    missing = [n for n, paths in files.items() if not all(p.is_file() and p.name.endswith(ending) for p in paths)]
    if missing or not cases:
        expected = f"{ending} files that exist, for one case or more"
        raise fault(
            f"{DATASET_FILE}: dataset", expected, f"{len(missing)} of {len(cases)} cases without", cases=missing
        )
    return cases


def _read_document(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        found = "no such file" if isinstance(error, FileNotFoundError) else "a file that is not JSON"
        raise fault(DATASET_FILE, "nnU-Net's JSON description of the data set", found, cases=[str(file)]) from error
    missing = [key for key in _REQUIRED_KEYS if not isinstance(document, dict) or key not in document]
    if missing:
        raise fault(DATASET_FILE, f"the keys {', '.join(_REQUIRED_KEYS)}", f"no {', '.join(missing)}", "add them")
    return document
