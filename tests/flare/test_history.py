from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from nnunet_flare.errors import StateError
from nnunet_flare.flare.history import RoundRecord, RunHistory, SiteFinal, SiteRound, duration_text
from nnunet_flare.nnunet.metrics import LabelMetrics


def site_round(dice: float, *, role: str = "train", seconds: float = 9.5) -> SiteRound:
    return SiteRound(
        dice={"heart": dice, "tumour": math.nan},
        train_loss=0.4 if role == "train" else math.nan,
        num_cases=8,
        upload_bytes=100 if role == "train" else 0,
        download_bytes=200,
        seconds=seconds,
        role=role,
    )


def round_record(number: int, seconds: float = 10.0, sites: int = 3, **missing: str) -> RoundRecord:
    results = {f"site-{i}": site_round(round(number / 10 + i / 100, 2)) for i in range(1, sites + 1)}
    return RoundRecord(round=number, sites=results, missing=missing, seconds=seconds)


def history(*rounds: RoundRecord, num_rounds: int = 10) -> RunHistory:
    run = RunHistory(run_name="demo", run_id="a1", num_rounds=num_rounds, started=1.7e9)
    for record in rounds:
        run = run.with_round(record)
    return run


def finished() -> RunHistory:
    scores = LabelMetrics(dsc=0.9, hd95_mm=2.5, nsd=0.95)
    absent = LabelMetrics(dsc=math.nan, hd95_mm=math.nan, nsd=math.nan)
    labels = {"heart": scores, "tumour": absent}
    final = {"site-1": SiteFinal(num_cases=1, labels=labels, foreground=scores, cases=(labels,))}
    return history(round_record(1)).changed(phase="done", final=final, artifacts={"model": "model/final.pth"})


def test_a_saved_history_loads_as_it_was(tmp_path):
    run = finished()
    run.save(tmp_path)
    assert repr(RunHistory.load(tmp_path)) == repr(run)  # as text, where nan equals nan


def test_the_file_is_plain_json_without_nan(tmp_path):
    run = history(replace(round_record(1), sites={"site-1": replace(site_round(0.5), train_loss=math.inf)}))
    run.save(tmp_path)
    content = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert content["rounds"][0]["sites"]["site-1"]["dice"] == {"heart": 0.5, "tumour": None}
    assert content["rounds"][0]["sites"]["site-1"]["train_loss"] is None


def test_the_table_holds_every_number_in_long_form(tmp_path):
    finished().save(tmp_path)
    with (tmp_path / "metrics.csv").open(newline="") as stream:
        rows = {tuple(row)[:4]: row[4] for row in csv.reader(stream)}
    assert rows["round", "site", "metric", "label"] == "value"
    assert float(rows["1", "site-2", "dice", "heart"]) == 0.12
    assert rows["1", "site-2", "dice", "tumour"] == ""
    assert float(rows["1", "site-2", "mean_dice", ""]) == 0.12
    assert rows["1", "site-3", "upload_bytes", ""] == "100"
    assert float(rows["1", "", "seconds", ""]) == 10
    assert float(rows["final", "site-1", "hd95_mm", "heart"]) == 2.5
    assert float(rows["final", "site-1", "mean_dsc", ""]) == 0.9


def test_a_repeated_round_replaces_itself_and_what_came_after_it():
    run = history(*(round_record(number) for number in (1, 2, 3)))
    assert [record.round for record in run.with_round(round_record(2)).rounds] == [1, 2]


def test_a_process_killed_while_it_saves_leaves_every_earlier_round_readable(tmp_path):
    history(round_record(1)).save(tmp_path)
    script = (
        "import sys; from pathlib import Path; from nnunet_flare.flare.history import RunHistory\n"
        "run = RunHistory.load(Path(sys.argv[1])); record = run.rounds[0]\n"
        "from dataclasses import replace\n"
        "for number in range(2, 10**6):\n"
        "    run = run.with_round(replace(record, round=number)); run.save(Path(sys.argv[1])); print(flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    for _ in range(40):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    saved = 41 + len(process.communicate()[0])
    assert [record.round for record in RunHistory.load(tmp_path).rounds[:saved]] == list(range(1, saved + 1))


def test_the_previous_record_survives_a_full_disk(tmp_path, monkeypatch):
    run = history(round_record(1))
    run.save(tmp_path)

    def refuse(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="no space left"):
        run.with_round(round_record(2)).save(tmp_path)
    assert len(RunHistory.load(tmp_path).rounds) == 1


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("phase",), "trane", "phase: expected one of describe, .*'trane'"),
        (("num_rounds",), "10", "run.num_rounds: expected int, found str"),
        (("num_rounds",), True, "run.num_rounds: expected int, found bool"),
        (("extra",), 1, "run: expected the keys"),
        (("rounds", 0, "sites", "site-2", "dice", "heart"), "good", r"site-2\.dice\.heart: expected float, found str"),
        (("rounds", 0, "sites"), [], "run.rounds.sites: expected .*Mapping.*, found list"),
        (("final", "site-1", "cases"), {}, "run.final.site-1.cases: expected .*tuple.*, found dict"),
    ],
)
def test_an_edited_record_is_refused_by_the_field_at_fault(tmp_path, path, value, complaint):
    finished().save(tmp_path)
    content = json.loads((tmp_path / "metrics.json").read_text())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    with pytest.raises(StateError, match=complaint):
        RunHistory.load(tmp_path)


@pytest.mark.parametrize("text", [None, "", "[]", '{"phase": '])
def test_a_folder_without_a_whole_record_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(StateError, match="give the folder of a run"):
        RunHistory.load(tmp_path)


def test_the_eta_is_the_median_round_time_for_each_round_to_come():
    run = history(round_record(1, seconds=300), round_record(2, seconds=10), round_record(3, seconds=12))
    assert run.eta_seconds() == 7 * 12
    assert history().eta_seconds() is None
    assert run.changed(phase="validate").eta_seconds() is None


def test_the_progress_line_names_round_dice_loss_time_and_who_is_missing():
    record = round_record(3, seconds=12, hospital="timeout")
    assert history(record).progress_line(record) == (
        "round 3 of 10  dice 0.32 (site-1 0.31  site-2 0.32  site-3 0.33)  loss 0.40  12 s  ETA 1 min 24 s"
        "  missing hospital"
    )


def test_the_progress_line_of_many_sites_names_the_lowest_and_the_highest():
    record = round_record(10, sites=20)
    assert history(record).progress_line(record) == (
        "round 10 of 10  dice 1.10 (20 sites, lowest and highest: site-1 1.01  site-20 1.20)  loss 0.40  10 s"
    )


def test_a_round_without_any_score_still_has_a_line():
    record = RoundRecord(round=1, sites={"site-1": site_round(math.nan, role="evaluate")}, seconds=1.0)
    assert "dice nan (site-1 nan)  loss nan" in history(record).progress_line(record)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.7, "1 min"), (80, "1 min 20 s"), (3600, "1 h"), (90061, "25 h 1 min")]
)
def test_durations_read_as_words(seconds, text):
    assert duration_text(seconds) == text
