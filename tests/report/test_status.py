from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from nnunet_flare.errors import StateError
from nnunet_flare.flare.history import RoundRecord, RunHistory, SiteFinal, SiteRound
from nnunet_flare.nnunet.metrics import LabelMetrics, mean_metrics
from nnunet_flare.report.status import status_text
from nnunet_flare.report.table import final_table

REASON = "site-2: reply: expected an answer within 3600 s, found none; restart the client at the site, see its log"


def metrics(dsc: float) -> LabelMetrics:
    return LabelMetrics(dsc=dsc, hd95_mm=2.0 + dsc, nsd=dsc)


def site_final(num_cases: int, **dsc: float) -> SiteFinal:
    cases = ({label: metrics(value) for label, value in dsc.items()},) * num_cases
    labels, foreground = mean_metrics(cases)
    return SiteFinal(num_cases=num_cases, labels=labels, foreground=foreground, cases=cases)


def training(num_sites: int = 2, missing: dict[str, str] | None = None) -> RunHistory:
    sites = {
        f"site-{i}": SiteRound(
            dice={"wall": 0.8, "ventricle": 0.9},
            train_loss=-0.4 if i > 1 else math.nan,
            num_cases=7,
            upload_bytes=134_000_000 if i > 1 else 0,
            download_bytes=134_000_000,
            seconds=61.0,
            role="train" if i > 1 else "evaluate",
        )
        for i in range(1, num_sites + 1)
    }
    run = RunHistory(run_name="heart", run_id="a1", num_rounds=10, started=1000.0)
    run = run.with_round(RoundRecord(round=1, sites=sites, missing=missing or {}, seconds=90.0))
    return run.changed(updated=1300.0)


def status(run: RunHistory, folder: Path) -> list[str]:
    run.save(folder)
    return status_text(folder).splitlines()


def test_a_run_in_training_shows_its_phase_rounds_eta_and_the_sites_last_scores(tmp_path):
    lines = status(training(), tmp_path)
    assert lines[:5] == [
        "run          heart (a1)",
        "phase        train (step 5 of 6)",
        "rounds done  1 of 10",
        "ETA          13 min 30 s",
        "time taken   5 min",
    ]
    assert lines[7:] == [
        "round 1",
        "site        role   Dice    loss  cases  up MB  down MB       time",
        "site-1  evaluate  0.850       -      7    0.0    134.0  1 min 1 s",
        "site-2     train  0.850  -0.400      7  134.0    134.0  1 min 1 s",
    ]


def test_missing_sites_are_named_with_their_reasons(tmp_path):
    text = status_text_of(training(missing={"site-2": REASON}), tmp_path)
    assert "missing in the last round\n  site-2  site-2: reply: expected an answer" in text


def status_text_of(run: RunHistory, folder: Path) -> str:
    return "\n".join(status(run, folder))


def test_a_run_before_its_first_round_has_a_status(tmp_path):
    run = RunHistory(run_name="heart", run_id="a1", num_rounds=10, started=1000.0)
    lines = status(run.changed(phase="fingerprint"), tmp_path)
    assert "phase        fingerprint (step 2 of 6)" in lines
    assert not any(line.startswith("ETA") for line in lines)


def test_a_failed_run_shows_its_error_and_a_resumed_one_does_not(tmp_path):
    failed = training().changed(phase="failed", error=REASON)
    assert "error        site-2: reply: expected an answer" in status_text_of(failed, tmp_path)
    assert "error" not in status_text_of(failed.changed(phase="train"), tmp_path)


def test_a_finished_run_shows_the_final_table_and_where_its_results_lie(tmp_path):
    final = {"site-10": site_final(2, wall=0.5, ventricle=0.9), "site-9": site_final(1, wall=0.75)}
    run = training().changed(phase="done", final=final, artifacts={"model": "model", "curves": "learning_curves.png"})
    lines = status(run, tmp_path)
    table = [
        "site           DSC wall  DSC ventricle  mean DSC  HD95 mm    NSD  cases",
        "site-9            0.750              -     0.750      2.8  0.750      1",
        "site-10           0.500          0.900     0.700      2.7  0.700      2",
        "mean of sites     0.625          0.900     0.725      2.7  0.725      3",
    ]
    results = [f"model   {tmp_path}/model", f"curves  {tmp_path}/learning_curves.png"]
    assert lines[-8:] == ["", *table, "", *results]


def test_scores_before_fine_tuning_are_shown_as_such(tmp_path):
    before, after = {"site-1": site_final(1, wall=0.5)}, {"site-1": site_final(1, wall=0.75)}
    lines = status(training().changed(phase="done", final=after, final_before_finetuning=before), tmp_path)
    first, second = lines.index("before fine-tuning"), lines.index("after fine-tuning")
    assert "0.500" in lines[first + 2]
    assert "0.750" in lines[second + 2]


def test_a_label_that_no_site_has_shows_a_dash():
    run = training().changed(final={"site-1": site_final(1, wall=0.5, absent=math.nan)})
    assert final_table(run.final).splitlines()[1].split() == ["site-1", "0.500", "-", "0.500", "2.5", "0.500", "1"]


@pytest.mark.parametrize("num_labels", [2, 8, 104])
def test_every_line_fits_100_columns_whatever_the_names_and_their_number(tmp_path, num_labels):
    labels = {f"left superior lobe of the lung {i}": 0.9 for i in range(num_labels)}
    run = training(num_sites=30, missing={"University Hospital of a Very Long Name": REASON * 4})
    assert max(map(len, status(run, tmp_path))) <= 100
    run = run.changed(
        final={"University Hospital of a Very Long Name": replace(site_final(1, **labels), num_cases=10**6)}
    )
    assert max(map(len, final_table(run.final).splitlines())) <= 100
    if num_labels == 104:
        assert final_table(run.final).endswith("more labels in metrics.csv)")


def test_text_from_a_site_cannot_steer_the_terminal(tmp_path):
    text = status_text_of(training(missing={"site-2": "gone\x1b[2J\r\nphase  done"}), tmp_path)
    assert "\x1b" not in text
    assert "\nphase  done" not in text


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(StateError, match="no such file; give the folder of a run"):
        status_text(tmp_path)
