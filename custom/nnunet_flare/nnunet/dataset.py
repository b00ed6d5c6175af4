"""nnU-Net's raw data set: which cases it holds, and the schema that all sites of a federation must share.

Nothing here reads a voxel. Case names go into ``local_detail`` only: they may identify patients.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nnunet_flare.errors import DatasetError, UpdateError

__all__ = ["Case", "DatasetSchema", "RawDataset", "check_schemas_match", "dataset_json", "find_dataset", "pair_cases"]

DATASET_FILE = "dataset.json"
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
            found=", ".join(folder.name for folder in chosen or ids) or "no data set",
            remedy="name one that is there, or correct nnunet_raw in the site's settings",
            local_detail=f"raw data folder: {raw_root}",
        )
    return chosen[0]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Files of one training case: an image per channel (or one colour image), and the label map."""

    images: tuple[Path, ...]
    label: Path


@dataclass(frozen=True, kw_only=True)
class DatasetSchema:
    """What a data set says about itself, free of cases and free text: it may leave the site.

    Args:
        channel_names: Channel index, from 0 without gaps, -> name. The name decides the normalisation.
        labels: Label name -> value, or the values of a region; ``background`` is 0, ``ignore`` the highest.
        regions_class_order: Label value that each region gets when regions are drawn in turn.
        file_ending: ``.nii.gz``, ``.png``, ...
        overwrite_image_reader_writer: nnU-Net's reader class; None lets the file ending decide.
        num_training: Number of training cases.

    Raises:
        DatasetError: a field is malformed, or nnU-Net cannot train on these labels.
    """

    channel_names: Mapping[int, str]
    labels: Mapping[str, int | tuple[int, ...]]
    regions_class_order: tuple[int, ...] | None = None
    file_ending: str
    overwrite_image_reader_writer: str | None = None
    num_training: int

    def __post_init__(self) -> None:
        channels, labels = self.channel_names, self.labels
        if not (isinstance(channels, Mapping) and channels and list(channels) == list(range(len(channels)))):
            raise self._malformed("channel_names", "the channels 0, 1, 2, ..., each with a name")
        if not all(map(_is_name, channels.values())):
            raise self._malformed("channel_names", "a name for each channel")
        if not (isinstance(labels, Mapping) and all(map(_is_name, labels)) and all(map(_is_label, labels.values()))):
            raise self._malformed("labels", "names with a value of 0 or more, or for a region a list of values")
        values = sorted({value for name in labels.keys() - {"ignore"} for value in _values(labels[name])})
        if labels.get("background") != 0 or len(values) < 2 or values != list(range(len(values))):
            raise self._malformed("labels", "background 0 and further labels 1, 2, 3, ... without a gap")
        if self.ignore_label not in (None, len(values)):
            raise self._malformed("labels", f"ignore as the highest label, {len(values)}")
        order, num_regions = self.regions_class_order, len(labels.keys() - {"background", "ignore"})
        if order is not None and not (
            isinstance(order, tuple) and all(map(_is_label, order)) and {*order} <= {*values}
        ):
            raise self._malformed("regions_class_order", "a list of label values")
        if self.has_regions and (order is None or len(order) != num_regions):
            raise self._malformed("regions_class_order", f"{num_regions} label values, one for each region")
        if not (isinstance(self.file_ending, str) and re.fullmatch(r"(\.[A-Za-z0-9]{1,10}){1,3}", self.file_ending)):
            raise self._malformed("file_ending", "an ending such as .nii.gz")
        reader = self.overwrite_image_reader_writer
        if reader is not None and not (_is_name(reader) and reader.isidentifier()):
            raise self._malformed("overwrite_image_reader_writer", "the name of a reader class of nnU-Net")
        if type(self.num_training) is not int or self.num_training < 1:
            raise self._malformed("num_training", "a number of cases above 0")

    def _malformed(self, name: str, expected: str) -> DatasetError:
        return _error(f"{DATASET_FILE}: {name}", expected, repr(getattr(self, name))[:200], f"correct {DATASET_FILE}")

    @property
    def has_regions(self) -> bool:
        """True if a label spans several values; nnU-Net then trains regions, in the order of ``labels``."""
        return any(len(_values(value)) > 1 for value in self.labels.values())

    @property
    def ignore_label(self) -> int | tuple[int, ...] | None:
        return self.labels.get("ignore")

    @classmethod
    def read(cls, folder: Path) -> DatasetSchema:
        """Schema of the data set in ``folder``, after every check of ``RawDataset.read``."""
        return RawDataset.read(folder).schema

    def to_json(self) -> dict[str, Any]:
        """JSON form; ``from_json`` is its inverse."""
        document = dataset_json(self, self.num_training)
        return {item.name: document.get(item.name) for item in fields(self)} | {"num_training": self.num_training}

    @classmethod
    def from_json(cls, values: Any) -> DatasetSchema:
        """Rebuild the schema that a site sent.

        Raises:
            UpdateError: not a schema: keys missing or unknown, wrong types, labels that nnU-Net cannot train on.
        """
        known = {item.name for item in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != known:
            raise UpdateError(
                field="data set schema",
                expected=f"the keys {', '.join(sorted(known))}",
                found=", ".join(map(repr, values))[:200] if isinstance(values, Mapping) else type(values).__name__,
                remedy="run the same version of nnunet-flare at every site",
            )
        try:
            return _schema(values, num_training=values["num_training"])
        except DatasetError as error:
            raise UpdateError(
                field=error.field, expected=error.expected, found=error.found, remedy=error.remedy
            ) from error


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
        schema = _schema(document, num_training=document["numTraining"])
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
            raise _error(
                "imagesTr", f"{channels} channels in each case", f"{len(odd)} cases with other channels", cases=odd
            )
        if schema.num_training != len(cases):
            remedy = "correct numTraining: nnU-Net limits the batch size by it"
            raise _error(f"{DATASET_FILE}: numTraining", f"{len(cases)} cases", str(schema.num_training), remedy)
        return cls(schema=schema, cases=cases)


def dataset_json(schema: DatasetSchema, num_training: int) -> dict[str, Any]:
    """``dataset.json`` of a model folder: what nnU-Net needs to predict, without descriptions and case lists."""
    optional = {
        "regions_class_order": schema.regions_class_order and list(schema.regions_class_order),
        "overwrite_image_reader_writer": schema.overwrite_image_reader_writer,
    }
    return {
        "channel_names": {str(index): name for index, name in schema.channel_names.items()},
        "labels": {name: list(value) if isinstance(value, tuple) else value for name, value in schema.labels.items()},
        "numTraining": num_training,
        "file_ending": schema.file_ending,
        **{name: value for name, value in optional.items() if value is not None},
    }


def check_schemas_match(schemas: Mapping[str, DatasetSchema]) -> None:
    """Check that the sites' data sets mean the same by every channel and label, whatever their sizes.

    Args:
        schemas: Site -> its schema; the first one is what the others are held against.

    Raises:
        DatasetError: a site differs; names the site, the field and both values.
    """
    first_site, first = next(iter(schemas.items()))
    for site, schema in schemas.items():
        for name in (item.name for item in fields(DatasetSchema) if item.name != "num_training"):
            want, got = getattr(first, name), getattr(schema, name)
            if name == "labels" and first.has_regions:  # a region's network output follows its place in the list
                want, got = ({**dict(enumerate(labels.items()))} for labels in (want, got))
            if want == got:
                continue
            if isinstance(want, Mapping):
                differing = [key for key in {**want, **got} if want.get(key) != got.get(key)]
                want, got = ({key: side[key] for key in differing if key in side} for side in (want, got))
            raise DatasetError(
                field=f"{DATASET_FILE}: {name}",
                expected=f"{want!r} as at {first_site}",
                found=repr(got),
                remedy=f"make {DATASET_FILE} and files alike at all sites, letter by letter",
                site=site,
            )


def files_by_stem(folder: Path, ending: str) -> dict[str, Path]:
    """Files of ``folder`` that end in ``ending``: name without the ending -> path, sorted by name.

    Raises:
        DatasetError: there is none, or two files stand for one name: they differ in letter case only, or one of
            them is in another image format.
    """
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    files = {path.name.removesuffix(ending): path for path in paths if path.name.endswith(ending)}
    if not files:
        raise _error(folder.name, f"{ending} files", "none", "check the folder and file_ending", cases=[str(folder)])
    other_ending = re.compile("|".join(f"(?:{re.escape(other)})$" for other in IMAGE_ENDINGS if other != ending))
    stems = Counter(stem.casefold() for stem in files)
    stems.update(other_ending.sub("", path.name).casefold() for path in paths if not path.name.endswith(ending))
    if twins := [stem for stem in files if stems[stem.casefold()] > 1]:
        raise _error(folder.name, "one file for each case", f"{len(twins)} names with two", "keep one", cases=twins)
    return files


def pair_cases(images: Mapping[str, Sequence[Path]], labels: Mapping[str, Path]) -> dict[str, Case]:
    """Cases by name.

    Raises:
        DatasetError: an image has no label, or a label no image.
    """
    for field, missing in (("labelsTr", images.keys() - labels), ("imagesTr", labels.keys() - images)):
        if missing:
            found = f"{len(missing)} cases without a file in {field}"
            raise _error(field, "an image and a label for each case", found, cases=missing)
    return {name: Case(images=tuple(images[name]), label=labels[name]) for name in images}


def _channels_by_case(files: Mapping[str, Path]) -> dict[str, tuple[Path, ...]]:
    """Group the files of ``imagesTr`` (``<case>_0000``, ``<case>_0001``, ...) by case, in order of channel."""
    numbers: dict[str, list[int]] = defaultdict(list)
    for stem in files:
        match = re.fullmatch(r"(.+)_(\d{4})", stem)
        numbers[match[1] if match else stem].append(int(match[2]) if match else -1)
    if odd := [case for case, found in numbers.items() if found != list(range(len(found)))]:
        expected = "files <case>_0000, <case>_0001, ... for channels 0, 1, ..."
        raise _error("imagesTr", expected, f"{len(odd)} cases with other file names", cases=odd)
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
        raise _error(f"{DATASET_FILE}: dataset", "images and label of each case", "another form") from error
    files = {name: (*case.images, case.label) for name, case in cases.items()}
    missing = [n for n, paths in files.items() if not all(p.is_file() and p.name.endswith(ending) for p in paths)]
    if missing or not cases:
        expected = f"{ending} files that exist, for one case or more"
        raise _error(
            f"{DATASET_FILE}: dataset", expected, f"{len(missing)} of {len(cases)} cases without", cases=missing
        )
    return cases


def _read_document(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        found = "no such file" if isinstance(error, FileNotFoundError) else "a file that is not JSON"
        raise _error(DATASET_FILE, "nnU-Net's JSON description of the data set", found, cases=[str(file)]) from error
    missing = [key for key in _REQUIRED_KEYS if not isinstance(document, dict) or key not in document]
    if missing:
        raise _error(DATASET_FILE, f"the keys {', '.join(_REQUIRED_KEYS)}", f"no {', '.join(missing)}", "add them")
    return document


def _schema(values: Mapping[str, Any], *, num_training: Any) -> DatasetSchema:
    """Schema from the keys that ``dataset.json`` and the JSON form have in common."""
    channels, labels, order = values["channel_names"], values["labels"], values.get("regions_class_order")
    if isinstance(channels, Mapping) and set(channels) == {str(index) for index in range(len(channels))}:
        channels = {index: channels[str(index)] for index in range(len(channels))}
    if isinstance(labels, Mapping):
        labels = {name: tuple(value) if isinstance(value, list) else value for name, value in labels.items()}
    reader = values.get("overwrite_image_reader_writer")
    return DatasetSchema(
        channel_names=channels,
        labels=labels,
        regions_class_order=tuple(order) if isinstance(order, list) else order,
        file_ending=values["file_ending"],
        overwrite_image_reader_writer=None if reader == "None" else reader,  # nnU-Net writes None as a word
        num_training=num_training,
    )


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 100 and value.isprintable()


def _values(label: object) -> tuple[Any, ...]:
    return label if isinstance(label, tuple) else (label,)


def _is_label(label: object) -> bool:
    values = _values(label)
    return bool(values) and all(type(value) is int and value >= 0 for value in values)


def _error(
    field: str, expected: str, found: str, remedy: str = "complete the data set", *, cases: Iterable[str] = ()
) -> DatasetError:
    detail = "\n".join(sorted(cases))
    return DatasetError(field=field, expected=expected, found=found, remedy=remedy, local_detail=detail)
