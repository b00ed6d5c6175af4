"""The final scores of a run as a text table, and where its results lie."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from nnunet_flare.flare.history import CSV_FILE, RunHistory, SiteFinal, in_site_order
from nnunet_flare.nnunet.metrics import LabelMetrics, mean_label_metrics, mean_metrics

__all__ = ["MAX_WIDTH", "artifact_lines", "cross_site_table", "final_table", "score_text", "table_lines"]

MAX_WIDTH = 100
_MAX_NAME_CHARS = 22
_GAP = "  "


def final_table(of_sites: Mapping[str, SiteFinal]) -> str:
    """One row a site and their mean, each site weighing equally.

    Columns: DSC of each label; DSC, HD95 and NSD averaged over the labels; validation cases. Labels that do not fit
    into ``MAX_WIDTH`` are left to ``metrics.csv``.
    """
    finals = list(of_sites.values())
    rows = [(site, of_sites[site]) for site in in_site_order(of_sites)]
    mean = SiteFinal(
        num_cases=sum(final.num_cases for final in finals),
        labels=mean_metrics([final.labels for final in finals])[0],
        foreground=mean_label_metrics(final.foreground for final in finals),
        cases=(),
    )
    rows.append(("mean of sites", mean))

    scores = [final.foreground for _, final in rows]
    left = ["site", *(site for site, _ in rows)]
    right = [
        ["mean DSC", *(score_text(score.dsc) for score in scores)],
        ["HD95 mm", *(score_text(score.hd95_mm, digits=1) for score in scores)],
        ["NSD", *(score_text(score.nsd) for score in scores)],
        ["cases", *(str(final.num_cases) for _, final in rows)],
    ]
    middle = [
        [f"DSC {label}", *(score_text(f.labels[label].dsc if label in f.labels else math.nan) for _, f in rows)]
        for label in mean.labels
    ]
    shown = len(middle)
    while len((lines := table_lines([left, *middle[:shown], *right]))[0]) > MAX_WIDTH and shown:
        shown -= 1
    if shown < len(middle):
        lines.append(f"({len(middle) - shown} more labels in {CSV_FILE})")
    return "\n".join(lines)


def cross_site_table(scores: Mapping[str, Mapping[str, LabelMetrics]]) -> str:
    """Mean DSC of every site's model (rows) on every site's validation cases (columns)."""
    owners = in_site_order(scores)
    sites = in_site_order({site for of_owner in scores.values() for site in of_owner})
    columns = [["model of", *owners]]
    for site in sites:
        cells = [score_text(scores[owner][site].dsc) if site in scores[owner] else "-" for owner in owners]
        columns.append([f"on {site}", *cells])
    return "\n".join(["mean DSC across sites", *table_lines(columns)])


def artifact_lines(history: RunHistory, run_folder: Path) -> list[str]:
    """Name and path of each result of the run; paths are never shortened, so that they can be copied."""
    width = max(map(len, history.artifacts), default=0)
    return [f"{name:<{width}}{_GAP}{run_folder / path}" for name, path in history.artifacts.items()]


def table_lines(columns: Sequence[Sequence[str]]) -> list[str]:
    """Lines of equal length from columns of cells, header first: the first column to the left, the others right.

    >>> table_lines([["site", "Graz"], ["dice", "0.9"]])
    ['site  dice', 'Graz   0.9']
    """
    padded = []
    for number, column in enumerate(columns):
        cells = [cell if len(cell) <= _MAX_NAME_CHARS else cell[: _MAX_NAME_CHARS - 1] + "…" for cell in column]
        width = max(map(len, cells))
        padded.append([cell.rjust(width) if number else cell.ljust(width) for cell in cells])
    return [_GAP.join(cells) for cells in zip(*padded, strict=True)]


def score_text(value: float, *, digits: int = 3) -> str:
    """The number, or a dash where there is none."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
