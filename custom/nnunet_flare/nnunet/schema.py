"""The schema of a data set: what the sites of a federation must have in common before anything is computed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from nnunet_flare.errors import DatasetError, UpdateError

__all__ = [
    "DATASET_FILE",
    "DatasetSchema",
    "check_labels_agree",
    "check_schemas_match",
    "dataset_json",
    "fault",
    "schema_from",
]

DATASET_FILE = "dataset.json"


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
        return fault(f"{DATASET_FILE}: {name}", expected, repr(getattr(self, name))[:200], f"correct {DATASET_FILE}")

    @property
    def has_regions(self) -> bool:
        """True if a label spans several values; nnU-Net then trains regions, in the order of ``labels``."""
        return any(len(_values(value)) > 1 for value in self.labels.values())

    @property
    def ignore_label(self) -> int | tuple[int, ...] | None:
        return self.labels.get("ignore")

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
            return schema_from(values, num_training=values["num_training"])
        except DatasetError as error:
            raise UpdateError(
                field=error.field, expected=error.expected, found=error.found, remedy=error.remedy
            ) from error


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


def check_labels_agree(schemas: Mapping[str, DatasetSchema]) -> None:
    """Check that a label has one value everywhere: what sites of different networks must have in common.

    A site may annotate some of the labels only. Its head then has other outputs than the others' and stays local,
    unless its data set names all labels and marks what nobody annotated with nnU-Net's ignore label.

    Raises:
        DatasetError: two sites give one label name different values; names both.
    """
    known: dict[str, tuple[str, int | tuple[int, ...]]] = {}
    for site, schema in schemas.items():
        for label, value in schema.labels.items():
            first_site, first = known.setdefault(label, (site, value))
            if value != first and label != "ignore":
                raise DatasetError(
                    field=f"{DATASET_FILE}: labels: {label}",
                    expected=f"{first!r} as at {first_site}",
                    found=repr(value),
                    remedy="number the labels alike at all sites: the same value would otherwise mean two things",
                    site=site,
                )


def schema_from(values: Mapping[str, Any], *, num_training: Any) -> DatasetSchema:
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


def fault(
    field: str, expected: str, found: str, remedy: str = "complete the data set", *, cases: Iterable[str] = ()
) -> DatasetError:
    detail = "\n".join(sorted(cases))
    return DatasetError(field=field, expected=expected, found=found, remedy=remedy, local_detail=detail)
