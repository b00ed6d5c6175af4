"""Time and memory of the server while it averages full-size replies, beside FLARE's stock FedAvg.

    python benchmarks/aggregate.py [--sites 2 20] [--rounds 2]

Each row is a job in FLARE's simulator, with every site in a process of its own and the server job in another, whose
VmHWM in /proc is read from here. The sites hold no nnU-Net: they wait until all of them have the task and then send the
layers back, so that all replies set out at once, the worst case for the server. ``nnunet-flare`` is the controller's
own train round; ``FedAvg`` is ``nvflare.app_common.workflows.fedavg`` with its built-in aggregator, on the same arrays.

A round lasts from the first task to the new global model. Memory is given in models (float32 bytes of the network of
``wire.py``) above what the process held before the first round, when it held no model.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from nvflare.apis.executor import Executor
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_common.workflows.fedavg import FedAvg

from nnunet_flare.flare.conductor import Conductor
from nnunet_flare.flare.config import FederationConfig
from nnunet_flare.flare.ffe import FFEController
from nnunet_flare.flare.protocol import TRAIN, Message, read_message
from nnunet_flare.flare.rounds import AveragingRounds, PlainAverage, SiteShare
from nnunet_flare.nnunet.config import TrainingConfig

SHAPES, SERVER_FILE = "shapes.json", "server.json"
LIMIT_S = 900
MODELS_ALLOWED = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[2, 20])
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    header = f"{'':<14}{'sites':>6}{'round s':>9}{'before MB':>11}{'peak MB':>9}{'models':>8}{'target':>8}"
    with tempfile.TemporaryDirectory() as scratch:
        shapes = Path(scratch, SHAPES)
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # torch stays out of this process
            model_bytes = pool.apply(write_shapes, (str(shapes),))
        print(f"one model: {model_bytes / 1e6:.1f} MB in float32; {options.rounds} rounds; replies all at once\n")
        print(header, flush=True)
        for num_sites in options.sites:
            for title, server in (("nnunet-flare", "TrainRounds"), ("FedAvg", "StockRounds")):
                folder = Path(scratch, f"{server}-{num_sites}")
                common = {"folder": str(folder), "num_rounds": options.rounds}
                write_job(
                    folder,
                    num_sites,
                    server={"path": f"aggregate.{server}", "args": common | {"shapes": str(shapes)}},
                    site={"path": "aggregate.Echo", "args": common | {"num_sites": num_sites}},
                )
                result = run(folder, num_sites)
                models = (result["peak"] - result["before"]) / model_bytes
                target = MODELS_ALLOWED + num_sites
                print(
                    f"{title:<14}{num_sites:>6}{median(result['seconds']):>9.1f}{result['before'] / 1e6:>11.0f}"
                    f"{result['peak'] / 1e6:>9.0f}{models:>8.1f}{target:>8}",
                    flush=True,
                )
    print(f"\ntarget: {MODELS_ALLOWED} models and one for every reply in flight")


def write_shapes(file: str, *, unique: bool = True) -> int:
    """Shapes of the network's unique tensors, or of every entry of its ``state_dict()``; returns their bytes."""
    from wire import full_size_network

    layers = full_size_network()[0 if unique else 1]
    Path(file).write_text(json.dumps({name: array.shape for name, array in layers.items()}))
    return sum(array.nbytes for array in layers.values())


def write_job(folder: Path, num_sites: int, *, server: Any, site: Any, modules: Sequence[str] = ("aggregate",)) -> None:
    """A FLARE job of one workflow and one executor (path and args); the job carries the modules that they are in."""
    configs = {
        "server": {
            "workflows": [{"id": "rounds", **server}],
            "server": {"task_request_interval": 0.2},
        },
        "client": {
            "executors": [{"tasks": [TRAIN], "executor": site}],
            "get_task_timeout": float(LIMIT_S),
            "submit_task_result_timeout": float(LIMIT_S),
        },
    }
    app = folder / "job" / "app"
    for part in ("config", "custom"):
        (app / part).mkdir(parents=True)
    for side, config in configs.items():
        config |= {"format_version": 2, "components": [], "task_data_filters": [], "task_result_filters": []}
        (app / "config" / f"config_fed_{side}.json").write_text(json.dumps(config))
    for module in modules:
        (app / "custom" / f"{module}.py").write_text(Path(__file__).with_name(f"{module}.py").read_text())
    meta = {"name": "aggregate", "min_clients": num_sites, "deploy_map": {"app": ["@ALL"]}}
    (folder / "job" / "meta.json").write_text(json.dumps(meta))


def run(folder: Path, num_sites: int) -> dict[str, Any]:
    """Run the job, watching the server's process; what the server noted, and the peak of its memory in bytes."""
    executable = Path(sys.executable).with_name("nvflare")
    command = [executable, "simulator", str(folder / "job"), "-w", str(folder / "workspace"), "-l", "concise"]
    command += ["-n", str(num_sites), "-t", str(num_sites)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    noted: dict[str, Any] = {}
    peak = 0
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            deadline = time.monotonic() + LIMIT_S
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
                if (folder / SERVER_FILE).exists():
                    noted = json.loads((folder / SERVER_FILE).read_text())
                    peak = max(peak, process_memory(noted["pid"], "VmHWM"))
        finally:
            process.terminate()
    if len(noted.get("seconds", ())) != len(noted.get("rounds", (0,))):
        raise RuntimeError(f"the job failed:\n{(folder / 'log.txt').read_text()[-4000:]}")
    return noted | {"peak": peak}


def process_memory(pid: int, field: str) -> int:
    """``VmHWM`` (peak) or ``VmRSS`` of a process in bytes; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


class Notes:
    """What the server's process says about itself, for ``run``."""

    def __init__(self, folder: str, num_rounds: int) -> None:
        self._file = Path(folder, SERVER_FILE)
        self._notes: dict[str, Any] = {"pid": os.getpid(), "before": process_memory(os.getpid(), "VmRSS")}
        self._notes |= {"seconds": [], "rounds": list(range(num_rounds))}
        self.add()

    def add(self, **values: Any) -> None:
        for name, value in values.items():
            self._notes.setdefault(name, []).append(value)
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._notes))
        temporary.replace(self._file)


def random_layers(shapes: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {n: rng.random(shape, np.float32) for n, shape in json.loads(Path(shapes).read_text()).items()}


class TrainRounds(FFEController):
    """The train rounds of the real controller, without the phases around them."""

    def __init__(self, folder: str, num_rounds: int, shapes: str) -> None:
        super().__init__("aggregate")
        self.folder, self.num_rounds, self.shapes = folder, num_rounds, shapes

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        notes = Notes(self.folder, self.num_rounds)
        sites = [client.name for client in fl_ctx.get_engine().get_clients()]
        layers: Mapping[str, np.ndarray] = random_layers(self.shapes)
        names, shapes = {name: name for name in layers}, {name: array.shape for name, array in layers.items()}
        share = SiteShare(role="train", names=names, shapes=shapes, weight=1, labels=("organ",))
        rounds = self.rounds(dict.fromkeys(sites, share), fl_ctx, abort_signal)
        for round_number in range(self.num_rounds):
            started = time.monotonic()
            layers, _ = rounds.run(round_number, layers, {})
            notes.add(seconds=time.monotonic() - started)

    def rounds(self, shares: Mapping[str, SiteShare], fl_ctx: FLContext, abort_signal: Signal) -> AveragingRounds:
        federation = FederationConfig(min_sites=len(shares))
        conductor = Conductor(self, federation, fl_ctx, abort_signal, print)
        average = PlainAverage(TrainingConfig(), shares, 1)
        return AveragingRounds(conductor=conductor, shares=shares, aggregation=average)

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Nothing of the run folder is written here."""


class StockRounds(FedAvg):
    """FLARE's FedAvg as it is; only the model comes from memory and is not saved."""

    def __init__(self, folder: str, num_rounds: int, shapes: str) -> None:
        super().__init__(num_clients=0, num_rounds=num_rounds, persistor_id="", save_filename=None, task_name=TRAIN)
        self.folder, self.shapes = folder, shapes

    def load_model(self) -> FLModel:
        self._notes = Notes(self.folder, self.num_rounds)
        return FLModel(params=random_layers(self.shapes), params_type=ParamsType.FULL)

    def send_model(self, **arguments: Any) -> None:
        self._started = time.monotonic()
        super().send_model(**arguments)

    def update_model(self, model: FLModel, aggregate: FLModel, **arguments: Any) -> FLModel:
        updated = super().update_model(model, aggregate, **arguments)
        self._notes.add(seconds=time.monotonic() - self._started)
        return updated


class Echo(Executor):
    """A site that waits until all sites have the task of the round, then sends the layers back."""

    def __init__(self, folder: str, num_rounds: int, num_sites: int) -> None:
        super().__init__()
        self.folder, self.num_rounds, self.num_sites = folder, num_rounds, num_sites

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        stock = shareable.get_header(AppConstants.CURRENT_ROUND)
        if stock is not None:
            model = FLModelUtils.from_shareable(shareable)
            self._meet(stock, fl_ctx)
            return FLModelUtils.to_shareable(FLModel(params=model.params, params_type=ParamsType.FULL))
        request = read_message(shareable, sender="server")
        self._meet(request.content["round"], fl_ctx)
        scores = {"dice": {"organ": 0.5}, "train_loss": 0.1, "num_cases": 10}
        return Message(content=scores, layers=request.layers, difference=True).to_shareable()

    def _meet(self, round_number: int, fl_ctx: FLContext) -> None:
        Path(self.folder, f"{round_number}-{fl_ctx.get_identity_name()}.here").touch()
        deadline = time.monotonic() + LIMIT_S
        while len(list(Path(self.folder).glob(f"{round_number}-*.here"))) < self.num_sites:
            if time.monotonic() > deadline:
                raise TimeoutError("not all sites have the task")
            time.sleep(0.05)


if __name__ == "__main__":
    main()
