"""Jobs as FLARE recipes: the one source of ``jobs/``, and the way to run a job from Python.

FFERecipe(training=TrainingConfig(dataset="Dataset027_ACDC")).execute(SimEnv(num_clients=3))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nvflare.apis.analytix import ANALYTIC_EVENT_TYPE
from nvflare.apis.job_def import ALL_SITES
from nvflare.app_opt.tracking.tb.tb_receiver import TBAnalyticsReceiver
from nvflare.job_config.api import FedJob
from nvflare.recipe.spec import Recipe

from nnunet_flare.aggregation.sharing import SharingConfig
from nnunet_flare.flare.asym import AsymFedAvgController
from nnunet_flare.flare.config import EncryptionConfig, FederationConfig
from nnunet_flare.flare.controller import TENSORBOARD_FOLDER, FederatedTraining
from nnunet_flare.flare.executor import NNUNetExecutor
from nnunet_flare.flare.ffe import FFEController
from nnunet_flare.flare.filters import BFVDecryptFilter, BFVEncryptFilter
from nnunet_flare.flare.protocol import KEY_TASKS, TASKS
from nnunet_flare.nnunet.config import TrainingConfig

__all__ = ["JOBS", "AsymFedAvgRecipe", "FFERecipe", "FederatedTrainingRecipe"]

_SERVER_PARAMETERS = {"server": {"task_request_interval": 0.2}}
_CLIENT_PARAMETERS = {
    "get_task_timeout": 600.0,
    "submit_task_result_timeout": 3600.0,
    "streaming_idle_timeout": 3600.0,  # an update waits at its site until the server comes to it
}
_PACKAGES = ["nnunet_flare"]
_MARKER = Path(__file__).parent / "job_marker" / "README"


class FederatedTrainingRecipe(Recipe):
    """What every job of this package consists of, around its controller."""

    def __init__(self, name: str, controller: FederatedTraining, federation: FederationConfig) -> None:
        meta, encrypted = None, controller.encryption is not None
        if gpus := federation.num_gpus:
            meta = {"launcher_spec": {"default": {"k8s": {"num_of_gpus": gpus}, "slurm": {"gpus_per_node": gpus}}}}
        job = FedJob(name=name, min_clients=federation.min_sites or 1, meta_props=meta)
        job.job.set_app_packages(_PACKAGES)
        job.to_server(_SERVER_PARAMETERS)
        job.to_server(controller)
        job.to_server(TBAnalyticsReceiver(tb_folder=TENSORBOARD_FOLDER, events=[ANALYTIC_EVENT_TYPE]), id="tensorboard")
        job.to_clients(_CLIENT_PARAMETERS)
        tasks = list(TASKS + KEY_TASKS if encrypted else TASKS)
        job.to_clients(NNUNetExecutor(), tasks=tasks)
        if encrypted:  # every task by its name: FLARE takes "*" for the name of a task
            client = job._deploy_map[ALL_SITES].app_config  # to_clients keeps tasks as a set, exported in any order
            client.task_data_filters.append((tasks, [BFVDecryptFilter()]))
            client.task_result_filters.append((tasks, [BFVEncryptFilter()]))
        job.add_file_to_clients(str(_MARKER))
        super().__init__(job)


class FFERecipe(FederatedTrainingRecipe):
    """Federated fingerprint extraction and federated nnU-Net training (``jobs/ffe``).

    Args:
        name: Name of the job, and of its run.
        training: What is trained.
        federation: Whom the server waits for, and how long.
        keep_local: Layers that stay at their site, as in ``SharingConfig``.
        encryption: How sums are encrypted (``jobs/ffe_he``); None leaves them in clear text.
    """

    def __init__(
        self,
        *,
        name: str = "ffe",
        training: TrainingConfig | None = None,
        federation: FederationConfig | None = None,
        keep_local: Sequence[str] = (),
        encryption: EncryptionConfig | None = None,
    ) -> None:
        training, federation = training or TrainingConfig(), federation or FederationConfig()
        settings = training.changes() or None, federation.changes() or None
        super().__init__(
            name,
            FFEController(name, *settings, list(keep_local) or None, encryption and encryption.to_json()),
            federation,
        )


class AsymFedAvgRecipe(FederatedTrainingRecipe):
    """Asymmetric federated averaging: each site trains the network that fits its own data (``jobs/asym_fedavg``).

    Args:
        name: Name of the job, and of its run.
        training: What is trained.
        federation: Whom the server waits for, and how long.
        sharing: Which layers the sites share.
        encryption: How sums are encrypted (``jobs/asym_fedavg_he``); None leaves them in clear text.
    """

    def __init__(
        self,
        *,
        name: str = "asym_fedavg",
        training: TrainingConfig | None = None,
        federation: FederationConfig | None = None,
        sharing: SharingConfig | None = None,
        encryption: EncryptionConfig | None = None,
    ) -> None:
        training, federation = training or TrainingConfig(), federation or FederationConfig()
        settings = training.changes() or None, federation.changes() or None
        sharing = sharing or SharingConfig()
        super().__init__(
            name,
            AsymFedAvgController(name, *settings, sharing.changes() or None, encryption and encryption.to_json()),
            federation,
        )


def demo_training() -> TrainingConfig:
    """Small enough for a laptop without a GPU: generated hearts, 2d, eight short rounds."""
    return TrainingConfig(
        configuration="2d",
        num_rounds=8,
        iterations_per_epoch=25,
        val_iterations_per_epoch=3,
        num_foreground_voxels=1_000_000,
    )


def mixed_demo_training() -> TrainingConfig:
    """Three generated hospitals whose images make nnU-Net plan unlike networks."""
    return TrainingConfig(
        dataset="demo_mixed",
        num_rounds=12,
        iterations_per_epoch=20,
        val_iterations_per_epoch=3,
        num_foreground_voxels=1_000_000,
        plans_overrides={"batch_size": 2},
    )


JOBS = {
    "ffe": lambda: FFERecipe(training=demo_training()),
    "ffe_he": lambda: FFERecipe(name="ffe_he", training=demo_training(), encryption=EncryptionConfig()),
    "asym_fedavg": lambda: AsymFedAvgRecipe(training=mixed_demo_training()),
    "asym_fedavg_he": lambda: AsymFedAvgRecipe(
        name="asym_fedavg_he", training=mixed_demo_training(), encryption=EncryptionConfig()
    ),
}
"""Committed job folder -> recipe."""


if __name__ == "__main__":
    for recipe in JOBS.values():
        recipe().export("jobs")
