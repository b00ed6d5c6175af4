"""Which site shares what with whom: as numbers, and the layer x site matrix as a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from nnunet_flare.aggregation.network import block_of, blocks_of
from nnunet_flare.aggregation.sharing import Sharing
from nnunet_flare.flare.history import in_site_order
from nnunet_flare.storage import write_atomically, write_json

__all__ = ["COVERAGE_FILE", "COVERAGE_PICTURE", "draw_coverage", "report_coverage"]

COVERAGE_FILE, COVERAGE_PICTURE = "coverage.json", "coverage.png"
ABSENT, LOCAL, FIRST_SHARED = 0, 1, 2
_COLOURS = ("#ffffff", "#c9c9c9", "#1b6ca8", "#e07b39", "#3f8f5f", "#8d5aa5", "#b8a02c", "#a83250")
_ROW_INCHES, _COLUMN_INCHES = 0.16, 0.9


def report_coverage(sharing: Sharing, folder: Path, say: Callable[[str], None]) -> None:
    """Write ``coverage.json`` and the picture into ``folder``, and say a line for each site."""
    coverage = sharing.coverage()
    write_json(folder / COVERAGE_FILE, coverage)
    draw_coverage(sharing, folder / COVERAGE_PICTURE)
    for site, covered in coverage.items():
        others = ", ".join(f"{share:.0%} with {other}" for other, share in covered["shared_with"].items())
        say(f"{site} shares {covered['shared']:.0%} of its parameters ({others})")


def draw_coverage(sharing: Sharing, file: Path) -> None:
    """One row per block of layers, one column per site: white where a site has no such block, grey where it is local,
    and one colour for each group of sites that shares it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    sites = in_site_order(sharing.networks)
    rows = list(dict.fromkeys(block_of(name) for site in sites for name in sharing.networks[site]))
    cohorts = sorted({block.sites for block in sharing.blocks}, key=lambda members: (-len(members), members))
    matrix = np.full((len(rows), len(sites)), ABSENT)
    for column, site in enumerate(sites):
        for block in blocks_of(sharing.networks[site]):
            matrix[rows.index(block), column] = LOCAL
    for block in sharing.blocks:
        if block.server_names():
            row = rows.index(block_of(next(iter(block.layers))))
            for site in block.sites:
                matrix[row, sites.index(site)] = FIRST_SHARED + cohorts.index(block.sites)

    colours = [*_COLOURS[:2], *(_COLOURS[2 + index % (len(_COLOURS) - 2)] for index in range(len(cohorts)))]
    figure = Figure(figsize=(4.5 + _COLUMN_INCHES * len(sites), 1.5 + _ROW_INCHES * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.pcolormesh(matrix, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(colours) - 0.5, edgecolors="white")
    axes.invert_yaxis()
    axes.set_xticks(np.arange(len(sites)) + 0.5, sites)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows, fontsize=6)
    axes.xaxis.tick_top()
    names = ["local", *("shared by " + ", ".join(in_site_order(members)) for members in cohorts)]
    legend = [Patch(color=colour, label=name) for colour, name in zip(colours[1:], names, strict=True)]
    figure.legend(handles=legend, loc="outside lower center", fontsize=7)
    write_atomically(file, lambda draft: figure.savefig(draft, format="png", dpi=120))
