"""``nnunet-flare status``: how far a run is, from its run folder or from what its server tells."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Mapping
from pathlib import Path

from nnunet_flare.flare.history import ENDS, JSON_FILE, PHASES, RoundRecord, RunHistory, duration_text, in_site_order
from nnunet_flare.report.table import MAX_WIDTH, artifact_lines, cross_site_table, final_table, score_text, table_lines

__all__ = ["history_text", "status_text"]


def status_text(run_folder: Path, *, with_artifacts: bool = True) -> str:
    """Phase, rounds, the sites' latest scores, missing sites, the error or the final table, and the artifacts.

    Of a run over several folds, one fold after the other.

    At most 100 columns wide, paths aside.

    Raises:
        StateError: ``run_folder`` holds no record of a run.
    """
    folds = sorted(run_folder.glob(f"fold_*/{JSON_FILE}"))
    if folds and not (run_folder / JSON_FILE).exists():
        return "\n\n\n".join(status_text(file.parent, with_artifacts=with_artifacts) for file in folds)
    history = RunHistory.load(run_folder)
    blocks = [history_text(history)]
    if with_artifacts and history.artifacts:
        blocks.append("\n".join(artifact_lines(history, run_folder)))
    return "\n\n".join(blocks)


def history_text(history: RunHistory) -> str:
    """As ``status_text``, without the artifacts."""
    facts = {"run": f"{history.run_name} ({history.run_id})", "phase": _phase(history)}
    facts["rounds done"] = f"{history.rounds_done} of {history.num_rounds}"
    if eta := history.eta_seconds():
        facts["ETA"] = duration_text(eta)
    facts["time taken"] = duration_text(max(0.0, history.updated - history.started))
    if history.phase not in ENDS:
        facts["last change"] = f"{duration_text(max(0.0, time.time() - history.updated))} ago"
    if history.phase == "failed":
        facts["error"] = history.error
    blocks = [_facts(facts)]
    if history.final_before_finetuning:
        blocks.append("before fine-tuning\n" + final_table(history.final_before_finetuning))
    if history.final:
        title = "after fine-tuning\n" if history.final_before_finetuning else ""
        blocks.append(title + final_table(history.final))
    elif history.rounds:
        blocks.append(_round_table(history.rounds[-1]))
    if history.cross_site:
        blocks.append(cross_site_table(history.cross_site))
    if history.rounds and (missing := history.rounds[-1].missing):
        reasons = {site: missing[site] for site in in_site_order(missing)}
        blocks.append("missing in the last round\n" + _facts(reasons, indent="  "))
    return "\n\n".join(blocks)


def _phase(history: RunHistory) -> str:
    if history.phase in ENDS:
        return history.phase
    steps = [phase for phase in PHASES if phase not in ENDS]
    return f"{history.phase} (step {steps.index(history.phase) + 1} of {len(steps)})"


def _facts(facts: Mapping[str, str], indent: str = "") -> str:
    """Names and texts in two columns; long texts are wrapped within theirs, and cannot steer the terminal."""
    width = max(map(len, facts))
    margin = indent + " " * (width + 2)
    printable = {name: "".join(c if c.isprintable() else " " for c in text) for name, text in facts.items()}
    return "\n".join(
        textwrap.fill(text, MAX_WIDTH, initial_indent=f"{indent}{name:<{width}}  ", subsequent_indent=margin)
        for name, text in printable.items()
    )


def _round_table(record: RoundRecord) -> str:
    sites = in_site_order(record.sites)
    rows = [record.sites[site] for site in sites]
    columns = [
        ["site", *sites],
        ["role", *(row.role for row in rows)],
        ["Dice", *(score_text(row.mean_dice) for row in rows)],
        ["loss", *(score_text(row.train_loss) for row in rows)],
        ["cases", *(str(row.num_cases) for row in rows)],
        ["up MB", *(f"{row.upload_bytes / 1e6:.1f}" for row in rows)],
        ["down MB", *(f"{row.download_bytes / 1e6:.1f}" for row in rows)],
        ["time", *(duration_text(row.seconds) for row in rows)],
    ]
    return "\n".join([f"round {record.round}", *table_lines(columns)])
