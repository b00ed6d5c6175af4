"""What the server remembers of a run: the phase, every round's scores, the final table.

The controller appends a record after each round and saves; ``nnunet-flare status`` and the report read it back.
``metrics.json`` is the record itself, ``metrics.csv`` the same numbers as one long table. Both are replaced in one
step, so that a process killed while it writes leaves the previous round's files whole.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import re
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from nnunet_flare.errors import StateError
from nnunet_flare.nnunet.metrics import LabelMetrics, mean_score
from nnunet_flare.storage import write_atomically

__all__ = [
    "CSV_FILE",
    "ENDS",
    "JSON_FILE",
    "PHASES",
    "RoundRecord",
    "RunHistory",
    "SiteFinal",
    "SiteRound",
    "duration_text",
    "in_site_order",
]

JSON_FILE = "metrics.json"
CSV_FILE = "metrics.csv"
PHASES = ("describe", "fingerprint", "plan", "preprocess", "train", "validate", "done", "failed")
ENDS = PHASES[-2:]
_MAX_SITES_IN_LINE = 6
_SITE_NUMBERS = (
    "train_loss",
    "num_cases",
    "upload_bytes",
    "download_bytes",
    "seconds",
    "num_clipped",
    "quantisation_error",
)
_RECENT_ROUNDS = 20


@dataclass(frozen=True, kw_only=True)
class SiteRound:
    """One site's part of a round.

    Args:
        dice: Label name -> pseudo Dice, on patches of the site's validation cases, of the global model that the
            round started from; nan where a label was not met.
        train_loss: Mean over the round's training batches; nan at a site that trains nothing.
        num_cases: Training cases of the site's fold.
        upload_bytes: Size of the layers that left the site.
        download_bytes: Size of the layers that the site received.
        seconds: From task to reply, measured at the server.
        role: ``train`` or ``evaluate``.
        num_clipped: Weights beyond the range of an encrypted vector.
        quantisation_error: Largest rounding error in it, in units of the weighted weights.
    """

    dice: Mapping[str, float]
    train_loss: float
    num_cases: int
    upload_bytes: int
    download_bytes: int
    seconds: float
    role: str
    num_clipped: int = 0
    quantisation_error: float = 0.0

    @property
    def mean_dice(self) -> float:
        return mean_score(self.dice.values())


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """One finished round.

    Args:
        round: Counted from 1.
        sites: Site -> its part.
        missing: Site that did not answer -> the reason.
        unchanged_layers: Layers that keep their values, for too few of the sites that share them have answered.
        seconds: From the first request to the last reply.
    """

    round: int
    sites: Mapping[str, SiteRound]
    missing: Mapping[str, str] = field(default_factory=dict)
    unchanged_layers: int = 0
    seconds: float

    @property
    def mean_dice(self) -> float:
        return mean_score(site.mean_dice for site in self.sites.values())

    @property
    def mean_train_loss(self) -> float:
        return mean_score(site.train_loss for site in self.sites.values())


@dataclass(frozen=True, kw_only=True)
class SiteFinal:
    """One site's validation of the final model; ``cases`` are in no order and carry no identifiers."""

    num_cases: int
    labels: Mapping[str, LabelMetrics]
    foreground: LabelMetrics
    cases: tuple[Mapping[str, LabelMetrics], ...]


@dataclass(frozen=True, kw_only=True)
class RunHistory:
    """A run as its server saw it.

    Args:
        run_name: Name that the submitter gave.
        run_id: Tells runs of one name apart.
        num_rounds: Rounds planned.
        started: Unix time of the first submission.
        phase: One of ``PHASES``.
        updated: Unix time of the latest change.
        rounds: Finished rounds, ascending.
        final: Site -> its scores of the model that it ends with.
        final_before_finetuning: Site -> its scores of the last averaged layers, where it fine-tunes them afterwards.
        cross_site: Site whose model it is -> site whose validation cases they are -> mean over the labels both know.
        error: What ended the run, when ``phase`` is ``failed``.
        artifacts: Name -> path relative to the run folder.
    """

    run_name: str
    run_id: str
    num_rounds: int
    started: float
    phase: str = PHASES[0]
    updated: float = 0.0
    rounds: tuple[RoundRecord, ...] = ()
    final: Mapping[str, SiteFinal] = field(default_factory=dict)
    final_before_finetuning: Mapping[str, SiteFinal] = field(default_factory=dict)
    cross_site: Mapping[str, Mapping[str, LabelMetrics]] = field(default_factory=dict)
    error: str = ""
    artifacts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise _broken("phase", f"one of {', '.join(PHASES)}", repr(self.phase))

    def changed(self, **changes: Any) -> RunHistory:
        """This history with some fields replaced, ``updated`` among them."""
        return replace(self, **{"updated": time.time(), **changes})

    def with_round(self, record: RoundRecord) -> RunHistory:
        """This history with one more round; a repeated round replaces itself and all that came after it."""
        earlier = tuple(item for item in self.rounds if item.round < record.round)
        return self.changed(phase="train", rounds=(*earlier, record))

    @property
    def rounds_done(self) -> int:
        return self.rounds[-1].round if self.rounds else 0

    def recent(self) -> RunHistory:
        """This history with its latest rounds alone: what somebody who follows the run has not seen yet."""
        return replace(self, rounds=self.rounds[-_RECENT_ROUNDS:])

    def eta_seconds(self) -> float | None:
        """Median round time times the rounds to come; None before the first round and after the training."""
        if not self.rounds or self.phase != "train":
            return None
        typical = statistics.median(record.seconds for record in self.rounds)
        return typical * max(0, self.num_rounds - self.rounds_done)

    def progress_line(self, record: RoundRecord) -> str:
        """The round in one line, for the log.

        >>> site = SiteRound(dice={"tumour": 0.5}, train_loss=0.41, num_cases=8, upload_bytes=4, download_bytes=4,
        ...     seconds=9.0, role="train")
        >>> record = RoundRecord(round=3, sites={"site-1": site}, missing={"site-2": "timeout"}, seconds=10.0)
        >>> history = RunHistory(run_name="demo", run_id="1", num_rounds=10, started=0.0).with_round(record)
        >>> history.progress_line(record)
        'round 3 of 10  dice 0.50 (site-1 0.50)  loss 0.41  10 s  ETA 1 min 10 s  missing site-2'
        """
        scores = {name: record.sites[name].mean_dice for name in in_site_order(record.sites)}
        if len(scores) <= _MAX_SITES_IN_LINE:
            sites = "  ".join(f"{name} {score:.2f}" for name, score in scores.items())
        else:
            ranked = sorted((score, name) for name, score in scores.items() if not math.isnan(score))
            sites = "  ".join(f"{name} {score:.2f}" for score, name in ranked[:1] + ranked[-1:])
            sites = f"{len(scores)} sites, lowest and highest: {sites}"
        parts = [
            f"round {record.round} of {self.num_rounds}",
            f"dice {record.mean_dice:.2f} ({sites})",
            f"loss {record.mean_train_loss:.2f}",
            duration_text(record.seconds),
        ]
        if eta := self.eta_seconds():
            parts.append(f"ETA {duration_text(eta)}")
        if record.missing:
            parts.append(f"missing {' '.join(in_site_order(record.missing))}")
        return "  ".join(parts)

    def save(self, folder: Path) -> None:
        """Replace ``metrics.json`` and ``metrics.csv`` in ``folder``, which is made where it is absent."""
        table = io.StringIO(newline="")
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(("round", "site", "metric", "label", "value"))
        writer.writerows((*row, value if math.isfinite(value) else "") for *row, value in self._rows())
        record = json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"
        # The JSON file comes last: it is what a resumed run continues from.
        write_atomically(folder / CSV_FILE, lambda draft: draft.write_text(table.getvalue(), encoding="utf-8"))
        write_atomically(folder / JSON_FILE, lambda draft: draft.write_text(record, encoding="utf-8"))

    @classmethod
    def load(cls, folder: Path) -> RunHistory:
        """Read ``metrics.json``.

        Raises:
            StateError: the file is absent, no JSON, or not of exactly this form.
        """
        try:
            content = json.loads((folder / JSON_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            found = "no such file" if isinstance(error, FileNotFoundError) else type(error).__name__
            raise _broken("file", "the record of a run", found, local_detail=str(error)) from error
        return cls.from_json(content)

    def to_json(self) -> dict[str, Any]:
        """In JSON's types; ``from_json`` is its inverse."""
        content: dict[str, Any] = _plain(self)
        return content

    @classmethod
    def from_json(cls, content: object) -> RunHistory:
        """Raises StateError: not of exactly the form that ``to_json`` gives."""
        history: RunHistory = _parsed(cls, content, "run")
        return history

    def _rows(self) -> Iterator[tuple[object, str, str, str, float]]:
        for record in self.rounds:
            yield record.round, "", "seconds", "", record.seconds
            for site, result in record.sites.items():
                for label, score in result.dice.items():
                    yield record.round, site, "dice", label, score
                yield record.round, site, "mean_dice", "", result.mean_dice
                for name in _SITE_NUMBERS:
                    yield record.round, site, name, "", getattr(result, name)
        for stage, of_sites in (("before fine-tuning", self.final_before_finetuning), ("final", self.final)):
            for site, final in of_sites.items():
                yield stage, site, "num_cases", "", final.num_cases
                for name in ("dsc", "hd95_mm", "nsd"):
                    for label, scores in final.labels.items():
                        yield stage, site, name, label, getattr(scores, name)
                    yield stage, site, f"mean_{name}", "", getattr(final.foreground, name)
        for owner, of_sites in self.cross_site.items():
            for site, scores in of_sites.items():
                for name in ("dsc", "hd95_mm", "nsd"):
                    yield f"model of {owner}", site, f"mean_{name}", "", getattr(scores, name)


def in_site_order(sites: Iterable[str]) -> list[str]:
    """Site names sorted as people count.

    >>> in_site_order(["site-10", "site-2", "Graz"])
    ['Graz', 'site-2', 'site-10']
    """
    return sorted(
        sites, key=lambda site: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", site)]
    )


def duration_text(seconds: float) -> str:
    """Seconds in words, two units at most.

    >>> duration_text(12.4), duration_text(80), duration_text(7300)
    ('12 s', '1 min 20 s', '2 h 1 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{value} {unit}" for value, unit in ((hours, "h"), (minutes, "min"), (rest, "s")) if value]
    return " ".join(parts[:2]) or "0 s"


def _plain(value: Any) -> Any:
    """``value`` in JSON's types; a number that is not finite becomes null, as JSON has no word for it."""
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_hints = functools.cache(get_type_hints)


def _parsed(kind: Any, value: Any, where: str) -> Any:
    """``value``, in JSON's types, as an object of the annotated type ``kind``."""
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        hints = _hints(kind)
        if set(value) != set(hints):
            raise _broken(where, f"the keys {', '.join(hints)}", ", ".join(value))
        return kind(**{name: _parsed(hints[name], item, f"{where}.{name}") for name, item in value.items()})
    if get_origin(kind) is Mapping and isinstance(value, dict):
        return {key: _parsed(get_args(kind)[1], item, f"{where}.{key}") for key, item in value.items()}
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_parsed(get_args(kind)[0], item, where) for item in value)
    if kind is float and (value is None or type(value) in (int, float)):
        return math.nan if value is None else float(value)
    if kind in (int, str) and type(value) is kind:
        return value
    raise _broken(where, getattr(kind, "__name__", str(kind)), type(value).__name__)


def _broken(where: str, expected: str, found: str, local_detail: str = "") -> StateError:
    return StateError(
        field=f"{JSON_FILE}: {where}",
        expected=expected,
        found=found,
        remedy="give the folder of a run, written by this version, and do not edit the file",
        local_detail=local_detail,
    )
