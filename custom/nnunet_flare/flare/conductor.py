"""One payload per site, replies taken as they come, a deadline: what every phase of a federated run needs."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from nvflare.apis.controller_spec import ClientTask, Task, TaskCompletionStatus
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import make_reply
from nvflare.apis.signal import Signal

from nnunet_flare.errors import NNUNetFlareError, ParticipationError
from nnunet_flare.flare.protocol import Message, read_message

__all__ = ["Participation", "RunStoppedError", "ask_sites"]

_POLL_SECONDS = 0.1
_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES = -3, 1024 * 1024


class RunStoppedError(Exception):
    """The job was aborted from outside."""


@dataclass(kw_only=True)
class Participation:
    """Who answered a phase, after how many seconds, and why the others did not."""

    seconds: dict[str, float] = field(default_factory=dict)
    failures: dict[str, NNUNetFlareError] = field(default_factory=dict)


def ask_sites(
    controller: Controller,
    requests: Mapping[str, tuple[str, Message]],
    accept: Callable[[str, Message], None],
    *,
    timeout_s: int,
    fl_ctx: FLContext,
    abort_signal: Signal,
) -> Participation:
    """Send each site its own request and hand each reply on as it arrives, one at a time.

    FLARE's ``broadcast`` would give every site the first site's payload; one ``send`` per site does not.

    Args:
        requests: Site -> task name and message.
        accept: Called with site and reply; an ``NNUNetFlareError`` that it raises counts as the site's failure.
        timeout_s: Deadline for all; a site that has not answered by then is a failure.

    Raises:
        RunStoppedError: the job was aborted.
    """
    _free_arrays_at_once()
    outcome = Participation()
    started = time.monotonic()

    def receive(client_task: ClientTask, fl_ctx: FLContext) -> None:
        site = client_task.client.name
        try:
            accept(site, read_message(client_task.result, sender=site))
            outcome.seconds[site] = time.monotonic() - started
        except NNUNetFlareError as error:
            error.site = site
            outcome.failures[site] = error
        client_task.result = make_reply(ReturnCode.OK)  # the layers must not stay until the task is cleared away

    tasks = {}
    for site, (name, message) in requests.items():
        tasks[site] = Task(name=name, data=message.to_shareable(), timeout=timeout_s, result_received_cb=receive)
        controller.send(tasks[site], fl_ctx, targets=[site])
    while any(task.completion_status is None for task in tasks.values()):
        if abort_signal.triggered:
            raise RunStoppedError
        time.sleep(_POLL_SECONDS)
    for site, task in tasks.items():
        task.data = task.result_received_cb = None  # FLARE's tasks sit in reference cycles and would keep the layers
        if site not in outcome.seconds and site not in outcome.failures:
            outcome.failures[site] = _silent(site, task.name, task.completion_status, timeout_s)
    gc.collect()  # and so do some of its replies
    return outcome


def _free_arrays_at_once() -> None:
    """Have glibc return every freed array of 1 MB or more to the system; with any other C library this does nothing.

    Left alone, glibc raises its limit for that (mallopt, M_MMAP_THRESHOLD) to up to 32 MB as large arrays are freed.
    Layers then lie among FLARE's chunks in heaps that hardly shrink: twice the memory (benchmarks/aggregate.py).
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)


def _silent(site: str, task_name: str, status: TaskCompletionStatus, timeout_s: int) -> ParticipationError:
    return ParticipationError(
        field=task_name,
        expected=f"a reply within {timeout_s} s",
        found=f"none ({status.value})",
        remedy="see whether the site is connected; it takes part in the next round again",
        site=site,
    )
