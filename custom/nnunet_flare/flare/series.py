"""Submissions that belong together: all those of a run until one of them is complete.

FLARE calls a job complete only some time after its run has finished. A job that is lost in between is submitted again,
and its series tells the server that the finished run is the one it asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvflare.apis.job_def import JobMetaKey

__all__ = ["in_series", "series_of"]

_PROPERTIES = JobMetaKey.CUSTOM_PROPS.value  # what FLARE carries from a submission to the job without looking at it
_NAME = "nnunet_flare_series"


def in_series(meta: Mapping[str, Any], series: str) -> dict[str, Any]:
    """The ``meta.json`` of a job as a submission of the series."""
    return {**meta, _PROPERTIES: {_NAME: series}}


def series_of(meta: Mapping[str, Any]) -> str:
    """Name of a job's series; empty where it was not sent by this package."""
    properties = meta.get(_PROPERTIES)
    series = properties.get(_NAME) if isinstance(properties, Mapping) else None
    return series if isinstance(series, str) else ""
