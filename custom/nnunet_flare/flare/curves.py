"""The run in one picture: Dice of the global model and training loss, round by round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_flare.flare.history import RunHistory, in_site_order
from nnunet_flare.storage import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["CURVES_FILE", "draw_learning_curves"]

CURVES_FILE = "learning_curves.png"
# Okabe and Ito's palette, told apart with any colour vision; its yellow is too pale for a line, its black is the mean.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7")
_DASHES = ("-", "--", ":")
_MAX_NAMED_SITES = len(_COLOURS) * len(_DASHES)
_MAX_ROUNDS_WITH_DOTS = 40


def draw_learning_curves(history: RunHistory, file: Path) -> None:
    """Draw ``history`` into a PNG of 1400 x 1000 pixels, which stays readable at a width of 900.

    Above: mean pseudo Dice of the global model at the start of each round, one line a site, black their mean. Below:
    training loss. A site that missed a round leaves a gap. The file is replaced in one step.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    sites = in_site_order({site for record in history.rounds for site in record.sites})
    rounds = [record.round for record in history.rounds]
    dice = {s: [r.sites[s].mean_dice if s in r.sites else float("nan") for r in history.rounds] for s in sites}
    loss = {s: [r.sites[s].train_loss if s in r.sites else float("nan") for r in history.rounds] for s in sites}

    figure = Figure(figsize=(14, 10), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _draw_lines(above, rounds, dice, mean=[record.mean_dice for record in history.rounds])
    _draw_lines(below, rounds, loss, mean=[record.mean_train_loss for record in history.rounds])

    done = f"{len(rounds)} of {history.num_rounds} rounds"
    above.set_title(f"{history.run_name}: {done}", loc="left", fontsize=20)
    above.set_ylabel("Dice of the global model", fontsize=17)
    above.set_ylim(-0.02, 1.02)
    below.set_ylabel("training loss", fontsize=17)
    below.set_xlabel("round", fontsize=17)
    below.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    below.set_xlim((rounds or [1])[0] - 0.5, (rounds or [1])[-1] + 0.5)
    for axes in (above, below):
        axes.tick_params(labelsize=15)
        axes.grid(color="0.88")
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    handles, names = above.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=15, frameon=False)
    write_atomically(file, lambda draft: figure.savefig(draft, format="png"))


def _draw_lines(
    axes: Axes, rounds: Sequence[int], values: Mapping[str, Sequence[float]], mean: Sequence[float]
) -> None:
    """One line a site, under the mean; with more sites than styles all sites are grey."""
    few = len(rounds) <= _MAX_ROUNDS_WITH_DOTS
    marker, width = ("o", 1.8) if few else ("", 1.2)
    named = len(values) <= _MAX_NAMED_SITES
    for i, (site, line) in enumerate(values.items()):
        colour = _COLOURS[i % len(_COLOURS)] if named else "0.7"
        style = _DASHES[i // len(_COLOURS)] if named else "-"
        name = site if named else ("" if i else f"{len(values)} sites")
        axes.plot(rounds, line, style, color=colour, marker=marker, markersize=5, linewidth=width, label=name)
    if len(values) > 1:
        axes.plot(rounds, mean, color="black", marker=marker, markersize=6, linewidth=1.7 * width, label="mean")
