"""Bytes, seconds, memory and error of one encrypted round, beside FLARE's own homomorphic encryption.

    python benchmarks/he.py [--sites 4] [--millions 31.2]

Both average the same layers of the network of ``wire.py``, normal values of standard deviation 0.05, with weights 1, 2,
3 and so on. Ours is ``encryption/vector.py``. FLARE's is what it ships, with the defaults of its classes and the CKKS
context of its ``HEBuilder``: ``HEModelEncryptor`` at a site, ``HEInTimeAccumulateWeightedAggregator`` and
``HEModelShareableGenerator`` at the server, ``HEModelDecryptor`` at a site.

A frame is what FLARE hands to a socket at once. CKKS vectors are part of a message's text and travel in one frame, as
FOBS writes it; arrays are fetched one by one, each in a frame as FLARE's downloader writes it. Frames lie in files.

Every phase of every site, and the server's, runs in a process of its own, which has its keys and, to encrypt, its
layers beforehand. Seconds are those from layers to frames, or from frames to layers, without the files; medians over
sites. The server's are, for one site, decoding and adding plus a part of finishing: the mean's frames, made once.
Memory is VmHWM in /proc above what the process held before the phase, and the most of any site.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
from aggregate import process_memory, write_shapes
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_opt.he.intime_accumulate_model_aggregator import HEInTimeAccumulateWeightedAggregator
from nvflare.app_opt.he.model_decryptor import HEModelDecryptor
from nvflare.app_opt.he.model_encryptor import HEModelEncryptor
from nvflare.app_opt.he.model_shareable_generator import HEModelShareableGenerator
from nvflare.fuel.sec.security_content_service import SecurityContentService
from nvflare.fuel.utils import fobs
from nvflare.lighter.constants import ProvFileName
from nvflare.lighter.impl.he import HEBuilder
from nvflare.private.fed.utils.fed_utils import nvflare_fobs_initialize

from nnunet_flare.encryption.key import AggregationKey
from nnunet_flare.encryption.parameters import PARAMETERS, Parameters
from nnunet_flare.encryption.vector import EncryptedSum, EncryptedVector, VectorLayout, decrypt_vector, encrypt_vector

SHAPES, WEIGHTS, MEAN = "shapes.json", "weights.json", "mean"
STANDARD_DEVIATION = 0.05
ROUND = 0
Arrays = dict[str, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--millions", type=float, default=math.inf, help="of values: whole layers that fit into these")
    options = parser.parse_args()
    weights = {f"site-{number}": number for number in range(1, options.sites + 1)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        in_own_process(write_shapes, str(folder / SHAPES))
        shapes = fitting(json.loads((folder / SHAPES).read_text()), options.millions * 1e6)
        (folder / SHAPES).write_text(json.dumps(shapes))
        (folder / WEIGHTS).write_text(json.dumps(weights))
        values = sum(map(math.prod, shapes.values()))
        print(f"{options.sites} sites, {len(shapes)} layers, {values / 1e6:.1f} million values", flush=True)
        for peer in PEERS:
            (folder / peer).mkdir()
            in_own_process(write_keys, peer, folder)
        phases = {peer: {"encrypt": [], "decrypt": []} for peer in PEERS}
        for site in weights:
            for peer in PEERS:
                phases[peer]["encrypt"].append(in_own_process(encrypt, peer, folder, site))
        for peer in PEERS:
            phases[peer]["aggregate"] = [in_own_process(aggregate, peer, folder)]
        for site in weights:
            for peer in PEERS:
                phases[peer]["decrypt"].append(in_own_process(decrypt, peer, folder, site))
        print_table(*(figures(phases[peer], folder / peer, list(weights), 4 * values) for peer in PEERS))


def fitting(shapes: Mapping[str, list[int]], room: float) -> dict[str, list[int]]:
    taken = {}
    for name, shape in shapes.items():
        if math.prod(shape) <= room:
            taken[name] = shape
            room -= math.prod(shape)
    return taken


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def figures(
    phases: Mapping[str, Sequence[Mapping[str, float]]], folder: Path, sites: Sequence[str], plain: int
) -> dict[str, float]:
    """Row of the table -> number."""

    def most(phase: str, figure: str) -> float:
        return max(item[figure] for item in phases[phase])

    return {
        "upload / float32": max(wire_bytes(folder / site) for site in sites) / plain,
        "download / float32": wire_bytes(folder / MEAN) / plain,
        "encrypt, s": median(item["seconds"] for item in phases["encrypt"]),
        "server, s a site": most("aggregate", "seconds") / len(sites),
        "decrypt, s": median(item["seconds"] for item in phases["decrypt"]),
        "memory, encrypt, MB": most("encrypt", "peak") / 1e6,
        "memory, server, MB": most("aggregate", "peak") / 1e6,
        "memory, decrypt, MB": most("decrypt", "peak") / 1e6,
        "largest error": most("decrypt", "largest"),
        "mean error": most("decrypt", "mean"),
    }


TARGETS = {
    "upload / float32": "ours <= 2.05",
    "encrypt, s": ">= 8",
    "server, s a site": ">= 40",
    "decrypt, s": ">= 4",
    "memory, encrypt, MB": ">= 20",
    "memory, server, MB": ">= 20",
    "memory, decrypt, MB": ">= 20",
}


def print_table(ours: Mapping[str, float], flare: Mapping[str, float]) -> None:
    print(f"\n{'':<24}{'ours':>10}{'FLARE':>10}{'ratio':>8}{'target':>16}")
    for row, value in ours.items():
        form = ".1e" if "error" in row else ".3f" if "float32" in row else ".1f"
        target = TARGETS.get(row, "")
        print(f"{row:<24}{value:>10{form}}{flare[row]:>10{form}}{flare[row] / value:>8.1f}{target:>16}")
    print(f"\nratio: FLARE / ours. Errors: of the mean of values with deviation {STANDARD_DEVIATION}, against float64")


# What follows runs in the children.


class Phase:
    """Seconds within ``with``, and the peak of this process's memory above what it held at the start."""

    def __init__(self) -> None:
        self.seconds = 0.0
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        self._before = process_memory(os.getpid(), "VmRSS")

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self._started

    def result(self) -> dict[str, float]:
        return {"seconds": self.seconds, "peak": process_memory(os.getpid(), "VmHWM") - self._before}


class Peer(Protocol):
    """One way of encrypting. Its files are in ``folder``; it makes frames of layers, and layers of frames."""

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, int]) -> None: ...
    def write_keys(self) -> None: ...
    def start_site(self, site: str) -> None: ...
    def start_server(self) -> None: ...
    def encrypt(self, layers: Arrays, phase: Phase) -> None: ...
    def add(self, site: str, phase: Phase) -> None: ...
    def finish(self, phase: Phase) -> None: ...
    def decrypt(self, phase: Phase) -> Arrays: ...


def write_keys(peer: str, folder: Path) -> None:
    new_peer(peer, folder).write_keys()


def encrypt(name: str, folder: Path, site: str) -> dict[str, float]:
    peer = new_peer(name, folder)
    peer.start_site(site)
    layers = dict(site_layers(folder, site))
    phase = Phase()
    peer.encrypt(layers, phase)
    return phase.result()


def aggregate(name: str, folder: Path) -> dict[str, float]:
    peer = new_peer(name, folder)
    peer.start_server()
    phase = Phase()
    for site in json.loads((folder / WEIGHTS).read_text()):
        peer.add(site, phase)
    peer.finish(phase)
    return phase.result()


def decrypt(name: str, folder: Path, site: str) -> dict[str, float]:
    peer = new_peer(name, folder)
    peer.start_site(site)
    phase = Phase()
    layers = peer.decrypt(phase)
    result = phase.result()
    weights = json.loads((folder / WEIGHTS).read_text())
    largest, total, size = 0.0, 0.0, 0
    for same_layer in zip(*(site_layers(folder, other) for other in weights), strict=True):
        values = np.array([array for _, array in same_layer], np.float64)
        truth = np.average(values, axis=0, weights=list(weights.values()))
        layer = layers.pop(same_layer[0][0])
        assert layer.dtype == np.float32
        errors = np.abs(layer - truth)
        largest, total, size = max(largest, float(errors.max())), total + float(errors.sum()), size + errors.size
    return result | {"largest": largest, "mean": total / size}


def new_peer(name: str, folder: Path) -> Peer:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # TenSEAL prints a warning for each CKKS vector
    logging.disable(logging.INFO)
    shapes = {layer: tuple(shape) for layer, shape in json.loads((folder / SHAPES).read_text()).items()}
    return PEERS[name](folder / name, shapes, json.loads((folder / WEIGHTS).read_text()))


def site_layers(folder: Path, site: str) -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(int(site.removeprefix("site-")))
    for name, shape in json.loads((folder / SHAPES).read_text()).items():
        values = rng.standard_normal(shape, np.float32)
        values *= STANDARD_DEVIATION
        yield name, values


def write_frame(folder: Path, frame: Sequence[bytes]) -> None:
    folder.mkdir(exist_ok=True)
    with (folder / f"{len(list(folder.iterdir())):05d}").open("wb") as file:
        file.writelines(frame)


def frame_files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def wire_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in frame_files(folder))


class Ours:
    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, int]) -> None:
        self._folder = folder
        self._layout = VectorLayout(scope="benchmark", shapes=shapes, weights=weights)

    def write_keys(self) -> None:
        key = AggregationKey.new(Parameters.for_sites(len(self._layout.weights)))
        (self._folder / "key").write_bytes(key.to_bytes())
        (self._folder / "public.json").write_text(json.dumps([key.id, key.parameters.id]))

    def start_site(self, site: str) -> None:
        self._site, self._key = site, AggregationKey.from_bytes((self._folder / "key").read_bytes())
        assert self._key.cipher

    def start_server(self) -> None:
        key_id, parameters = json.loads((self._folder / "public.json").read_text())
        self._sum = EncryptedSum(self._layout, key_id=key_id, parameters=PARAMETERS[parameters], round_number=ROUND)

    def encrypt(self, layers: Arrays, phase: Phase) -> None:
        with phase:
            vector, _ = encrypt_vector(layers, self._layout, self._key, site=self._site, round_number=ROUND)
        self._send(vector, self._site, phase)

    def add(self, site: str, phase: Phase) -> None:
        vector = self._receive(site, phase)
        with phase:
            self._sum.add(vector, site=site)

    def finish(self, phase: Phase) -> None:
        with phase:
            vector = self._sum.result()
        self._send(vector, MEAN, phase)

    def decrypt(self, phase: Phase) -> Arrays:
        vector = self._receive(MEAN, phase)
        with phase:
            return decrypt_vector(vector, self._layout, self._key, round_number=ROUND, least_sites=2)

    def _send(self, vector: EncryptedVector, name: str, phase: Phase) -> None:
        for key, array in vector.to_arrays().items():
            with phase:
                stream = io.BytesIO()
                np.savez(stream, allow_pickle=False, **{key: array})
                frame = stream.getvalue()
            write_frame(self._folder / name, [frame])

    def _receive(self, name: str, phase: Phase) -> EncryptedVector:
        arrays: Arrays = {}
        for file in frame_files(self._folder / name):
            frame = file.read_bytes()
            with phase, np.load(io.BytesIO(frame), allow_pickle=False) as content:
                arrays |= content
        return EncryptedVector.from_arrays(arrays)


class Flare:
    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, int]) -> None:
        self._folder, self._shapes, self._weights = folder, shapes, weights
        nvflare_fobs_initialize()
        SecurityContentService.initialize(content_folder=str(folder))
        self._context = FLContext()
        self._context.set_prop(FLContextKey.SECURE_MODE, False)  # the files are not signed
        self._context.set_prop(AppConstants.CURRENT_ROUND, ROUND)

    def write_keys(self) -> None:
        builder = HEBuilder()
        builder.initialize(None, None)
        for name, is_client in (
            (ProvFileName.CLIENT_CONTEXT_TENSEAL, True),
            (ProvFileName.SERVER_CONTEXT_TENSEAL, False),
        ):
            (self._folder / name).write_bytes(builder.get_serialized_context(is_client=is_client))

    def start_site(self, site: str) -> None:
        self._site, peer = site, FLContext()
        peer.set_prop(ReservedKey.IDENTITY_NAME, "server")
        self._context.set_peer_context(peer)
        self._encryptor, self._decryptor = HEModelEncryptor(), HEModelDecryptor()
        for item in (self._encryptor, self._decryptor):
            item.handle_event(EventType.START_RUN, self._context)

    def start_server(self) -> None:
        self._context.set_prop(AppConstants.GLOBAL_MODEL, make_model_learnable({}, {}))
        self._aggregator = HEInTimeAccumulateWeightedAggregator(
            expected_data_kind=DataKind.WEIGHTS,
            aggregation_weights=dict.fromkeys(self._weights, 1.0),  # sites have weighted their layers
        )
        self._generator = HEModelShareableGenerator()
        for item in (self._aggregator, self._generator):
            item.handle_event(EventType.START_RUN, self._context)

    def encrypt(self, layers: Arrays, phase: Phase) -> None:
        with phase:
            dxo = DXO(DataKind.WEIGHTS, layers, meta={MetaKey.NUM_STEPS_CURRENT_ROUND: self._weights[self._site]})
            reply = self._encryptor.process(dxo.to_shareable(), self._context)
        self._send(reply, self._site, phase)

    def add(self, site: str, phase: Phase) -> None:
        reply = self._receive(site, phase)
        reply.set_peer_props({ReservedKey.IDENTITY_NAME: site})
        reply.add_cookie(AppConstants.CONTRIBUTION_ROUND, ROUND)
        with phase:
            accepted = self._aggregator.accept(reply, self._context)
        assert accepted

    def finish(self, phase: Phase) -> None:
        with phase:
            model = self._generator.shareable_to_learnable(self._aggregator.aggregate(self._context), self._context)
            task = self._generator.learnable_to_shareable(model, self._context)
        self._send(task, MEAN, phase)

    def decrypt(self, phase: Phase) -> Arrays:
        task = self._receive(MEAN, phase)
        with phase:
            layers = from_shareable(self._decryptor.process(task, self._context)).data
            for name, shape in self._shapes.items():
                layers[name] = np.array(layers[name], np.float32).reshape(shape)
        return layers

    def _send(self, message: Shareable, name: str, phase: Phase) -> None:
        with phase:
            frame = fobs.dumps(message, buffer_list=True)
        write_frame(self._folder / name, frame)

    def _receive(self, name: str, phase: Phase) -> Any:
        (file,) = frame_files(self._folder / name)
        frame = file.read_bytes()
        with phase:
            return fobs.loads(frame)


PEERS: dict[str, type[Peer]] = {"ours": Ours, "FLARE": Flare}

if __name__ == "__main__":
    main()
