"""Bytes and seconds of a round in which only the layers that sites share travel, beside sending whole models.

    python benchmarks/asym.py [--sites 2] [--overlaps 25 50 75 100] [--repeats 5]

One job in FLARE's simulator, as in ``aggregate.py``: every site is a process that holds no nnU-Net and sends the layers
back once all sites have the task. Sites' networks are those of ``wire.py``, alike in some of their blocks and unlike in
the others; ``Sharing`` finds what is common, as in a job, and the controller's own train round averages it. Blocks are
taken in alphabetical order while they fit into the overlap asked for. 100 % is whole models; the last row sends the
entries of ``state_dict()`` as they are.

Rows take turns, in reverse every second time, so that a busy machine is busy for all. Bytes are all frames that a
site's process writes to its sockets (up) and reads from them (down) while the round lasts, requests for tasks and
chunks and acknowledgements included; the most that any site had in any round is shown. Seconds are medians, and ratios
of seconds are to the 100 % round of the same turn. Nobody trains: seconds are those of transport and averaging alone.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from aggregate import Echo, Notes, TrainRounds, random_layers, run, write_job, write_shapes
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_context import FLContext
from nvflare.apis.signal import Signal
from wire import count_bytes

from nnunet_flare.aggregation.network import Layer, Network, blocks_of
from nnunet_flare.aggregation.sharing import Sharing, SharingConfig
from nnunet_flare.flare.rounds import SiteShare

WHOLE, EVERY_ENTRY = "100 %", "state_dict()"
LAYERS, ENTRIES = "layers.json", "state_dict.json"
TARGET = 1.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--overlaps", type=int, nargs="+", default=[25, 50, 75, 100], help="percent; must include 100")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if 100 not in options.overlaps:
        parser.error("--overlaps must include 100, which the others are compared with")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # torch stays out of this process
            whole = pool.apply(write_shapes, (str(folder / LAYERS),))
            pool.apply(write_shapes, (str(folder / ENTRIES),), {"unique": False})
        num_rounds = options.repeats * (len(options.overlaps) + 1)
        common = {"folder": scratch, "num_rounds": num_rounds}
        write_job(
            folder,
            options.sites,
            server={"path": "asym.AsymRounds", "args": common | {"overlaps": options.overlaps}},
            site={"path": "asym.CountingEcho", "args": common | {"num_sites": options.sites}},
            modules=("aggregate", "wire", "asym"),
        )
        rounds = run(folder, options.sites)["measured"]
    print(f"{options.sites} sites, {options.repeats} turns; one model: {whole / 1e6:.1f} MB in float32\n")
    print_table(rounds, whole)


def print_table(rounds: Sequence[Mapping[str, Any]], whole: int) -> None:
    print(f"{'':<32}{'MB':>9}{'of one model':>18}{'of what is shared':>20}{'round':>15}{'to 100 %':>10}")
    print(
        f"{'overlap':<14}{'reached':>8}{'down':>10}{'up':>9}{'down':>9}{'up':>9}{'down':>11}{'up':>9}{'target':>8}"
        f"{'s':>7}{'median':>10}  range"
    )
    whole_s = [item["seconds"] for item in rounds if item["row"] == WHOLE]
    for row in dict.fromkeys(item["row"] for item in rounds):
        mine = [item for item in rounds if item["row"] == row]
        shared, target = mine[0]["shared"], "" if row == EVERY_ENTRY else TARGET
        up, down = (max(item["bytes"][way] for item in mine) for way in (0, 1))
        ratios = [item["seconds"] / base_s for item, base_s in zip(mine, whole_s, strict=True)]
        print(
            f"{row:<14}{shared / whole:>8.1%}{down / 1e6:>10.2f}{up / 1e6:>9.2f}{down / whole:>9.4f}{up / whole:>9.4f}"
            f"{down / shared:>11.4f}{up / shared:>9.4f}{target:>8}{median(item['seconds'] for item in mine):>7.1f}"
            f"{median(ratios):>10.2f}  {min(ratios):.2f} to {max(ratios):.2f}"
        )


def networks_alike(network: Network, percent: int, sites: Sequence[str]) -> dict[str, Network]:
    """A network for each site: alike in blocks of up to so many of its parameters, unlike in the others."""
    room = sum(layer.size for layer in network.values()) * percent // 100
    alike: set[str] = set()
    for layers in blocks_of(network).values():
        size = sum(layer.size for layer in layers.values())
        if size <= room:
            room -= size
            alike |= layers.keys()
    return {
        site: {name: layer if name in alike else replace(layer, meaning=site) for name, layer in network.items()}
        for site in sites
    }


class AsymRounds(TrainRounds):
    """Train rounds of every overlap in turn, after one that is not measured."""

    def __init__(self, folder: str, num_rounds: int, overlaps: list[int]) -> None:
        super().__init__(folder, num_rounds, str(Path(folder, LAYERS)))
        self.overlaps = overlaps

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        notes = Notes(self.folder, self.num_rounds)
        sites = sorted(client.name for client in fl_ctx.get_engine().get_clients())
        layers, entries = random_layers(self.shapes), random_layers(str(Path(self.folder, ENTRIES)))
        network = {name: Layer(shape=array.shape) for name, array in layers.items()}
        rows = {}
        for percent in self.overlaps:
            sharing = Sharing.among(networks_alike(network, percent, sites), SharingConfig(min_overlap=0))
            rows[f"{percent} %"] = layers, {site: share(sharing.names_of(site), layers) for site in sites}
        rows[EVERY_ENTRY] = entries, dict.fromkeys(sites, share({name: name for name in entries}, entries))
        turns = self.num_rounds // len(rows)
        order = [row for turn in range(turns) for row in (reversed(rows) if turn % 2 else rows)]
        for number, row in enumerate([WHOLE, *order]):
            values, shares = rows[row]
            shared = {key: values[key] for key in shares[sites[0]].names.values()}
            before, started = self._counts(sites) if number else 0, time.monotonic()
            self.rounds(shares, fl_ctx, abort_signal).run(number, shared, {})
            seconds = time.monotonic() - started
            if number:
                most = (self._counts(sites) - before).max(axis=0).tolist()
                size = sum(array.nbytes for array in shared.values())
                measured = {"row": row, "shared": size, "seconds": seconds, "bytes": most}
                notes.add(seconds=seconds, measured=measured)

    def _counts(self, sites: Sequence[str]) -> np.ndarray:
        """Bytes up and down until now, a row for each site."""
        return np.stack([np.fromfile(Path(self.folder, f"{site}.bytes"), np.int64) for site in sites])


def share(names: Mapping[str, str], values: Mapping[str, np.ndarray]) -> SiteShare:
    shapes = {name: values[key].shape for name, key in names.items()}
    return SiteShare(role="train", names=names, shapes=shapes, weight=1, labels=("organ",))


class CountingEcho(Echo):
    """A site that keeps count, in a file that the server reads, of what its process writes to sockets and reads."""

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.START_RUN:
            file = Path(self.folder, f"{fl_ctx.get_identity_name()}.bytes")
            self._counting = contextlib.ExitStack()  # left when the process ends
            self._counting.enter_context(count_bytes(np.memmap(file, np.int64, "w+", shape=(2,))))


if __name__ == "__main__":
    main()
