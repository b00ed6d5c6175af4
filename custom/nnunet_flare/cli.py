"""The command ``nnunet-flare``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunet_flare import __version__
from nnunet_flare.errors import ConfigError, NNUNetFlareError
from nnunet_flare.nnunet.site import SiteSettings, state_home

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, or 1 with the reason on standard error."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except NNUNetFlareError as error:
        print(f"nnunet-flare: {error}", file=sys.stderr)
        if error.local_detail:
            print(error.local_detail, file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nnunet-flare", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    submit = commands.add_parser("submit", help="check a job and send it to the FLARE server")
    submit.add_argument("job", type=Path, help="folder of an exported job, such as jobs/ffe")
    _add_kit(submit, required=True)
    submit.add_argument("--follow", action="store_true", help="show the run's progress until it ends")
    submit.add_argument(
        "--retry",
        type=int,
        default=0,
        metavar="N",
        help="follow, and submit again up to N times without a round gained when the job fails; "
        "a site that comes late joins after a round",
    )
    submit.add_argument(
        "--wait",
        type=float,
        default=30.0,
        metavar="MINUTES",
        help="for the server or for sites to be connected again (default: 30)",
    )
    submit.set_defaults(command=_submit)

    status = commands.add_parser("status", help="show how far a run is, and its results")
    status.add_argument("run", help="name of a run; without --kit also its folder at the server")
    _add_kit(status)
    status.add_argument("--follow", action="store_true", help="show a running job's progress until it ends")
    status.set_defaults(command=_status)

    fetch = commands.add_parser("fetch", help="bring the results of a finished run here, with a model to predict from")
    fetch.add_argument("run", help="name of the run")
    _add_kit(fetch, required=True)
    fetch.add_argument("--out", type=Path, help="folder to make (default: results/RUN)")
    fetch.set_defaults(command=_fetch)

    stop = commands.add_parser("stop", help="stop a running job; submitted again, the run continues")
    stop.add_argument("run", help="name of the run")
    _add_kit(stop, required=True)
    stop.set_defaults(command=_stop)

    doctor = commands.add_parser("doctor", help="check this site, or a start-up kit and what it needs")
    doctor.add_argument("--kit", type=Path, help="start-up kit of a hospital, of the server or of a user")
    doctor.add_argument("--site", default="site-1", help="name of the site (default: site-1)")
    doctor.add_argument("--dataset", help="data set, where the site's settings name none")
    doctor.add_argument("--local", type=Path, help="the site's local folder, holding nnunet_flare.json")
    doctor.set_defaults(command=_doctor)

    policy = commands.add_parser("policy", help="write or record the policy of a site's start-up kit")
    actions = policy.add_subparsers(required=True, metavar="ACTION")
    install = actions.add_parser("install", help="write this package's policy into a kit that was made without it")
    record = actions.add_parser("record", help="record and sign the policy files as they are, after a wanted change")
    for action, run in ((install, _policy_install), (record, _policy_record)):
        action.add_argument("kit", type=Path, help="start-up kit of a hospital or of the server")
        action.set_defaults(command=run)
    install.add_argument(
        "--require-encryption",
        action=argparse.BooleanOptionalAction,
        help="refuse jobs without encryption at this hospital (default: as the kit's policy says already)",
    )

    job = commands.add_parser("job", help="write a FLARE job folder with your settings")
    job.add_argument("name", help="name of the job and of its run")
    job.add_argument("--method", choices=("ffe", "asym_fedavg"), default="ffe", help="default: ffe")
    job.add_argument("--out", type=Path, default=Path("jobs"), help="parent folder (default: jobs)")
    job.add_argument("--min-sites", type=int, help="sites that must train in every round (default: all)")
    job.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="SETTING=VALUE",
        help="training setting, such as num_rounds=50 or dataset=27; may be given many times",
    )
    job.add_argument(
        "--share",
        dest="sharing",
        action="append",
        default=[],
        metavar="SETTING=VALUE",
        help="what the sites share, such as sharing=cohort or keep_local='[\"norm\"]'; may be given many times",
    )
    job.add_argument(
        "--encrypt",
        nargs="*",
        metavar="SETTING=VALUE",
        help="add the sites' layers and fingerprints encrypted; settings: key_holder=SITE, max_abs_weight=8",
    )
    job.add_argument("--gpus", type=int, help="GPUs for each site's job under Kubernetes or Slurm")
    job.add_argument("--cross-site", action="store_true", help="score every site's model on every site in the end")
    job.set_defaults(command=_job)

    ca = commands.add_parser("ca", help="write a provisioned project's CA as nvflare cert approve reads it")
    ca.add_argument("state", type=Path, help="folder state of the provisioning workspace")
    ca.add_argument("--out", type=Path, required=True, help="folder to make; keep it to yourself")
    ca.set_defaults(command=_ca)

    split = commands.add_parser("split", help="split a data set into site data sets for the simulator")
    split.add_argument("source", type=Path, nargs="+", help="nnU-Net raw data set, or images and labels folders")
    split.add_argument("--out", type=Path, required=True, help="folder to make")
    how = split.add_mutually_exclusive_group(required=True)
    how.add_argument("--csv", type=Path, help="table with the header case,site")
    how.add_argument("--fractions", help="such as site-1=0.5,site-2=0.3,site-3=0.2")
    split.add_argument("--seed", type=int, default=0, help="of the shuffle before sharing out by fractions")
    split.add_argument("--patient", help="regular expression with one group: the patient in a case name")
    split.add_argument("--spacing", help="resample sites to x,y,z mm, such as site-2=1x1x2,site-3=1.5x1.5x1.5")
    split.add_argument("--name", help="name of the data set")
    split.add_argument("--channel", help="channel name, where the source has no dataset.json")
    split.add_argument("--labels", help="such as background=0,tumour=1, where the source has no dataset.json")
    split.set_defaults(command=_split)
    return parser


def _add_kit(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    parser.add_argument("--kit", type=Path, required=required, help="start-up kit of a person, from provisioning")


def _submit(options: argparse.Namespace) -> int:
    from nnunet_flare.console.commands import submit

    return submit(options.kit, options.job, follow=options.follow, retries=options.retry, wait_s=60 * options.wait)


def _status(options: argparse.Namespace) -> int:
    if options.kit:
        from nnunet_flare.console.commands import show_status

        return show_status(options.kit, options.run, follow=options.follow)
    from nnunet_flare.report.status import status_text

    folder = Path(options.run)
    if not folder.is_dir():
        folder = state_home() / "server" / "runs" / options.run
    print(status_text(folder))
    return 0


def _fetch(options: argparse.Namespace) -> int:
    from nnunet_flare.console.commands import fetch

    return fetch(options.kit, options.run, options.out or Path("results") / options.run)


def _stop(options: argparse.Namespace) -> int:
    from nnunet_flare.console.commands import stop

    return stop(options.kit, options.run)


def _doctor(options: argparse.Namespace) -> int:
    from nnunet_flare.report.doctor import diagnose, doctor_text, exit_status

    if options.kit:
        from nnunet_flare.report.kit import diagnose_kit

        checks = diagnose_kit(options.kit, options.dataset)
    else:
        settings = SiteSettings.load(options.site, options.local)
        checks = diagnose(replace(settings, dataset=options.dataset) if options.dataset else settings)
    print(doctor_text(checks))
    return exit_status(checks)


def _policy_install(options: argparse.Namespace) -> int:
    from nnunet_flare.provision.builder import install_policy
    from nnunet_flare.provision.kit import StartupKit

    kit = StartupKit.read_site(options.kit)
    policy = kit.policy
    if options.require_encryption is not None:
        policy = replace(policy, require_encryption=options.require_encryption)
    install_policy(kit.folder, policy)
    return _show_policy(kit.folder)


def _policy_record(options: argparse.Namespace) -> int:
    from nnunet_flare.provision.kit import StartupKit
    from nnunet_flare.provision.manifest import PolicyManifest

    kit = StartupKit.read_site(options.kit)
    PolicyManifest.write(kit.folder)
    return _show_policy(kit.folder)


def _show_policy(kit: Path) -> int:
    from nnunet_flare.provision.manifest import PolicyManifest

    manifest = PolicyManifest.check(kit)
    print("\n".join([f"signed by the {manifest.signer}:", *manifest.files]))
    return 0


def _job(options: argparse.Namespace) -> int:
    from nnunet_flare.aggregation.sharing import SharingConfig
    from nnunet_flare.flare.config import EncryptionConfig, FederationConfig
    from nnunet_flare.nnunet.config import TrainingConfig
    from nnunet_flare.recipe import AsymFedAvgRecipe, FFERecipe

    training = TrainingConfig.from_json(dict(_setting(text) for text in options.settings))
    federation = FederationConfig(min_sites=options.min_sites, cross_site=options.cross_site, num_gpus=options.gpus)
    sharing = dict(_setting(text) for text in options.sharing)
    config = SharingConfig.from_json(sharing)
    encryption = None
    if options.encrypt is not None:
        encryption = EncryptionConfig.from_json(dict(_setting(text) for text in options.encrypt))
    common = {"name": options.name, "training": training, "federation": federation, "encryption": encryption}
    if options.method == "asym_fedavg":
        recipe = AsymFedAvgRecipe(**common, sharing=config)
    elif sharing.keys() <= {"keep_local"}:
        recipe = FFERecipe(**common, keep_local=config.keep_local)
    else:
        raise ConfigError(
            field="sharing",
            expected="keep_local alone, for one network is planned and shared",
            found=", ".join(sharing),
            remedy="add --method asym_fedavg, or leave the setting out",
        )
    recipe.export(str(options.out))
    print(f"wrote {options.out / options.name}")
    return 0


def _setting(text: str) -> tuple[str, Any]:
    """``num_rounds=50`` -> ("num_rounds", 50); values are JSON, or else text."""
    name, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(
            field="settings", expected="SETTING=VALUE", found=text, remedy="write for example num_rounds=50"
        )
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _ca(options: argparse.Namespace) -> int:
    from nnunet_flare.provision.ca import export_ca

    fingerprint = export_ca(options.state, options.out)
    print(f"wrote {options.out}\nSHA256 Fingerprint={fingerprint}")
    return 0


def _split(options: argparse.Namespace) -> int:
    from nnunet_flare.nnunet.assignment import FractionAssignment, TableAssignment, parse_fractions, parse_spacings
    from nnunet_flare.nnunet.site import SETTINGS_FILE, SETTINGS_VARIABLE
    from nnunet_flare.nnunet.split import split_dataset

    assignment = (
        TableAssignment(file=options.csv)
        if options.csv
        else FractionAssignment(
            fractions=parse_fractions(options.fractions), seed=options.seed, patient_pattern=options.patient
        )
    )
    labels = dict(_setting(item) for item in options.labels.split(",")) if options.labels else None
    folders = split_dataset(
        options.source[0] if len(options.source) == 1 else tuple(options.source),
        options.out,
        assignment=assignment,
        spacing_mm=parse_spacings(options.spacing) if options.spacing else None,
        name=options.name,
        channel_names={0: options.channel} if options.channel else None,
        labels=labels,
    )
    for site, folder in folders.items():
        print(f"{site}: {folder}")
    print(f"for the simulator: export {SETTINGS_VARIABLE}={options.out / SETTINGS_FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
