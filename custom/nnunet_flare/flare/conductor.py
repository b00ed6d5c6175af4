"""One payload per site, replies taken as they come, a deadline: what every phase of a federated run needs."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

from nvflare.apis.controller_spec import ClientTask, Task, TaskCompletionStatus
from nvflare.apis.fl_constant import ReturnCode, ServerCommandNames
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.fuel.f3.cellnet.defs import CellChannel

from nnunet_flare.errors import DecryptionError, NNUNetFlareError, ParticipationError
from nnunet_flare.flare.config import FederationConfig
from nnunet_flare.flare.protocol import Message, read_message
from nnunet_flare.flare.transfer import fetch_layers

__all__ = ["Conductor", "Participation", "RunStoppedError"]

_POLL_SECONDS = 0.1
_REPLIES_IN_MEMORY = 4
_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES = -3, 1024 * 1024


Requests = Mapping[str, tuple[str, Message]]
"""Site -> task name and message."""


class RunStoppedError(Exception):
    """The job was aborted from outside."""


@dataclass(kw_only=True)
class Participation:
    """Who answered a phase, after how many seconds, and why the others did not."""

    seconds: dict[str, float] = field(default_factory=dict)
    failures: dict[str, NNUNetFlareError] = field(default_factory=dict)


class Conductor:
    """Asks the sites of one job: a payload for each, replies as they come, a deadline, a least number of answers.

    Args:
        controller: FLARE's way of sending tasks.
        config: Deadlines, and ``min_sites``.
        fl_ctx: Of the job, at the server.
        abort_signal: FLARE's; ends every wait.
        say: Writes a line to the server's log.
    """

    def __init__(
        self,
        controller: Controller,
        config: FederationConfig,
        fl_ctx: FLContext,
        abort_signal: Signal,
        say: Callable[[str], None],
    ) -> None:
        self._controller, self._config, self._fl_ctx, self._say = controller, config, fl_ctx, say
        self.abort_signal, self.min_sites = abort_signal, config.min_sites or 1

    def ask_every(
        self,
        requests: Requests,
        accept: Callable[[str, Message], None] = lambda site, reply: None,
        *,
        layer_bytes: Mapping[str, int] | None = None,
    ) -> dict[str, Message]:
        """Ask for something that every site must deliver, within the deadline of a phase (``ask``).

        Raises:
            NNUNetFlareError: the first site's error; all of them are in the server's log.
            RunStoppedError: the job was aborted.
        """
        replies: dict[str, Message] = {}

        def take(site: str, reply: Message) -> None:
            accept(site, reply)
            replies[site] = replace(reply, layers={})

        outcome = self.ask(requests, take, layer_bytes=layer_bytes)
        for site in sorted(outcome.failures):
            self._say(f"{requests[site][0]}: {outcome.failures[site]}")
        if outcome.failures:
            raise outcome.failures[min(outcome.failures)]
        return {site: replies[site] for site in requests}

    def require(self, number: int, what: str, failures: Mapping[str, NNUNetFlareError]) -> None:
        """Raises ParticipationError: fewer than ``min_sites``; names what failed where."""
        if number < self.min_sites:
            reasons = "; ".join(str(error) for error in failures.values())
            raise ParticipationError(
                field=what,
                expected=f"at least {self.min_sites}",
                found=f"{number} ({reasons})" if reasons else str(number),
                remedy="mend the sites named, or lower min_sites, then submit again: the run continues from here",
            )

    def ask(
        self,
        requests: Requests,
        accept: Callable[[str, Message], None],
        *,
        within_round: bool = False,
        layer_bytes: Mapping[str, int] | None = None,
    ) -> Participation:
        """Send each site its own request and hand each reply on as it arrives, one at a time.

        FLARE's ``broadcast`` would give every site the first site's payload; one ``send`` per site does not. Replies
        come without their layers, which are fetched for at most ``_REPLIES_IN_MEMORY`` sites at once: left alone, FLARE
        fetches all of them as they come, and ends the job when one such transfer fails.

        Args:
            requests: Site -> task name and message.
            accept: Called with site and reply; an ``NNUNetFlareError`` that it raises counts as the site's failure.
            layer_bytes: Site -> the most that the layers of its reply can be; other replies may bring none, and are
                refused before anything is fetched.
            within_round: The deadline is that of a round; a site that has not answered by then is a failure.

        Raises:
            DecryptionError: a site could not trust a sum; no other failure of a site ends more than its part.
            RunStoppedError: the job was aborted.
        """
        config, fl_ctx, abort_signal = self._config, self._fl_ctx, self.abort_signal
        timeout_s = config.round_timeout_s if within_round else config.phase_timeout_s
        _free_arrays_at_once()
        outcome = Participation()
        started = time.monotonic()
        cell = fl_ctx.get_engine().server.command_agent.cell  # the job's; in the simulator get_cell() is another one
        cell.decode_pass_through_topics.add((CellChannel.SERVER_COMMAND, ServerCommandNames.SUBMIT_UPDATE))
        give_up = Signal(parent=abort_signal)
        accepting = threading.Lock()

        def take(site: str, reply: Shareable) -> None:
            try:
                fetch = None
                if layer_bytes is not None:
                    fetch = partial(fetch_layers, cell=cell, site=site, max_bytes=layer_bytes[site], give_up=give_up)
                message = read_message(reply, sender=site, fetch=fetch)
                with accepting:
                    accept(site, message)
                outcome.seconds[site] = time.monotonic() - started
            except NNUNetFlareError as error:
                error.site = site
                outcome.failures[site] = error

        def receive(client_task: ClientTask, fl_ctx: FLContext) -> None:
            # FLARE calls this under locks that every request of every site needs: one slow transfer would stop them all
            taken.append(pool.submit(take, client_task.client.name, client_task.result))
            client_task.result = make_reply(ReturnCode.OK)

        tasks: dict[str, Task] = {}
        taken: list[Future[None]] = []
        with ThreadPoolExecutor(_REPLIES_IN_MEMORY) as pool:
            for site, (name, message) in requests.items():
                data = message.to_shareable()
                tasks[site] = Task(name=name, data=data, timeout=timeout_s, result_received_cb=receive)
                self._controller.send(tasks[site], fl_ctx, targets=[site])
            while any(task.completion_status is None for task in tasks.values()) or not all(t.done() for t in taken):
                if abort_signal.triggered:
                    raise RunStoppedError
                if time.monotonic() - started > timeout_s:
                    give_up.trigger(True)
                time.sleep(_POLL_SECONDS)
        for done in taken:
            done.result()  # raises what no site is to blame for
        for site, task in tasks.items():
            task.data = task.result_received_cb = None  # FLARE's tasks sit in reference cycles and would keep layers
            if site not in outcome.seconds and site not in outcome.failures:
                outcome.failures[site] = _silent(site, task.name, task.completion_status, timeout_s)
        gc.collect()  # and so do some of its replies
        for error in outcome.failures.values():
            if isinstance(error, DecryptionError):
                raise error
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
