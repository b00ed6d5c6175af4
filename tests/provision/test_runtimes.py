"""What ``nvflare deploy prepare`` makes of the inputs in provisioning/; no engine runs, its artefacts are checked."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from local_federation import SERVER, LocalFederation
from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_launcher_spec import JobProcessArgs
from nvflare.apis.workspace import Workspace
from nvflare.app_opt.job_launcher.docker_launcher import ClientDockerJobLauncher
from nvflare.app_opt.job_launcher.k8s_launcher import K8sJobHandle, _keep_startup_file
from nvflare.app_opt.job_launcher.study_runtime import load_study_runtime_file
from nvflare.app_opt.job_launcher.workspace_cell_transfer import _zip_workspace_to_file

from commands import run
from nnunet_flare import __version__
from nnunet_flare.errors import PolicyError
from nnunet_flare.provision.manifest import SITE as SIGNED_BY_SITE
from nnunet_flare.provision.manifest import PolicyManifest
from nnunet_flare.provision.storage import KitStorage

ROOT = Path(__file__).parents[2]
INPUTS = ROOT / "provisioning" / "deploy"
DOCKERFILE = (ROOT / "provisioning" / "Dockerfile").read_text()
RUNTIMES = ("docker", "k8s", "slurm")
SITE = "hospital-a"
MOUNT = "/var/tmp/nvflare/workspace"
LAUNCHERS = {
    "docker": "nvflare.app_opt.job_launcher.docker_launcher.{}DockerJobLauncher",
    "k8s": "nvflare.app_opt.job_launcher.k8s_launcher.{}K8sJobLauncher",
    "slurm": "nvflare.app_opt.job_launcher.slurm.{}SlurmJobLauncher",
}


@pytest.fixture(scope="module")
def provisioned(tmp_path_factory: pytest.TempPathFactory) -> LocalFederation:
    """The kits of provisioning/project.yml; nothing is started."""
    federation = LocalFederation(tmp_path_factory.mktemp("provisioned"))
    federation.provision()
    return federation


def of(*runtimes: str, kits: tuple[str, ...] = (SERVER, SITE)) -> pytest.MarkDecorator:
    """Which prepared kits a test is about."""
    cases = [(runtime, kit) for runtime in runtimes for kit in kits]
    return pytest.mark.parametrize("prepared", cases, ids="-".join, indirect=True)


@pytest.fixture(scope="module")
def prepared(request: pytest.FixtureRequest, provisioned: LocalFederation, tmp_path_factory: pytest.TempPathFactory):
    """One kit with our study_runtime.yaml, and the same kit prepared for one runtime."""
    runtime, name = request.param
    folder = tmp_path_factory.mktemp("prepared")
    kit = shutil.copytree(provisioned.kits[name], folder / "kit" / name)
    role = "server" if name == SERVER else "site"
    study = "slurm" if runtime == "slurm" else f"{runtime}_{role}"
    shutil.copy(INPUTS / "study_runtime" / f"{study}.yaml", kit / "local" / "study_runtime.yaml")
    output = folder / name
    config = INPUTS / f"{runtime}.yaml"
    run("nvflare", "deploy", "prepare", kit, "--config", config, "--output", output, folder=folder)
    server = provisioned.project["participants"][0]
    ports = {server["fed_learn_port"], server["admin_port"]} if role == "server" else set()
    return SimpleNamespace(runtime=runtime, role=role, name=name, kit=kit, output=output, ports=ports)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def components(kit: Path) -> dict[str, dict]:
    resources = json.loads((kit / "local" / "resources.json.default").read_text())
    return {component["id"]: component for component in resources["components"]}


@of(*RUNTIMES)
def test_jobs_are_launched_by_the_runtimes_own_launcher_and_no_other(prepared):
    found = components(prepared.output)
    launcher = LAUNCHERS[prepared.runtime].format("Server" if prepared.role == "server" else "Client")
    assert [item["path"] for name, item in found.items() if name.endswith("_launcher")] == [launcher]
    assert found["resource_manager"]["path"].endswith(".PassthroughResourceManager")
    assert "resource_consumer" not in found


@of(*RUNTIMES)
def test_preparing_changes_these_files_and_no_others(prepared):
    before, after = contents(prepared.kit), contents(prepared.output)
    written = {name for name in after if before.get(name) != after[name]}
    removed = {name for name in before if name not in after}
    chart = {name for name in written if name.startswith("helm_chart/")}
    starts = {"docker": {"startup/start_docker.sh"}, "k8s": set(), "slurm": {"startup/start_slurm.sh"}}
    assert written - chart == {"local/resources.json.default", "local/comm_config.json"} | starts[prepared.runtime]
    assert bool(chart) == (prepared.runtime == "k8s")
    kept = {"startup/sub_start.sh"} if prepared.runtime == "slurm" else set()
    stale = {"local/resources.json"} | {f"startup/{name}.sh" for name in ("start", "sub_start", "stop_fl")}
    assert removed == stale - kept


@of(*RUNTIMES)
def test_the_policy_stays_in_force_and_the_site_records_it_anew(prepared):
    before = json.loads((prepared.kit / "local" / "resources.json").read_text())
    after = json.loads((prepared.output / "local" / "resources.json.default").read_text())
    kept = before.keys() - {"components", "snapshot_persistor"}
    assert {key: after.get(key) for key in kept} == {key: before[key] for key in kept}
    assert after["components"][0]["path"] == "nnunet_flare.provision.guard.PolicyGuard"

    kit = shutil.copytree(prepared.output, prepared.output.with_name("recorded"), dirs_exist_ok=True)
    with pytest.raises(PolicyError, match=r"resources\.json was removed, .*resources\.json\.default was changed"):
        PolicyManifest.check(kit)
    PolicyManifest.write(kit)
    assert PolicyManifest.check(kit).signer == SIGNED_BY_SITE
    (kit / "local" / "study_runtime.yaml").write_text("studies: {}")
    with pytest.raises(PolicyError, match=r"study_runtime\.yaml was changed"):
        PolicyManifest.check(kit)


@of(*RUNTIMES)
def test_the_private_key_is_in_startup_alone_and_only_its_owner_reads_it(prepared):
    keys = [name for name, content in contents(prepared.output).items() if b"PRIVATE KEY" in content]
    key = f"startup/{'server' if prepared.role == 'server' else 'client'}.key"
    assert keys == [key]
    assert (prepared.output / key).stat().st_mode & 0o077 == 0


@of(*RUNTIMES)
def test_parent_and_jobs_talk_over_mutual_tls(prepared):
    internal = json.loads((prepared.output / "local" / "comm_config.json").read_text())["internal"]
    assert (internal["scheme"], internal["resources"]["connection_security"]) == ("tcp", "mtls")


@of(*RUNTIMES, kits=(SERVER,))
def test_the_server_keeps_its_jobs_in_the_workspace(prepared):
    workspace = str(prepared.output) if prepared.runtime == "slurm" else MOUNT
    assert components(prepared.output)["job_manager"]["args"]["uri_root"] == f"{workspace}/jobs-storage"
    resources = json.loads((prepared.output / "local" / "resources.json.default").read_text())
    storage = resources["snapshot_persistor"]["args"]["storage"]
    assert storage["args"] == {"root_dir": f"{workspace}/snapshot-storage"}


@of("slurm", kits=(SERVER,))
def test_jobs_are_stored_where_the_prepared_server_says(prepared, monkeypatch):
    jobs = components(prepared.output)["job_manager"]["args"]["uri_root"]
    monkeypatch.chdir(prepared.output)
    KitStorage().create_object(f"{jobs}/a-job", b"", {})
    assert KitStorage().list_objects(jobs) == [f"{jobs}/a-job"]
    assert (prepared.output / "jobs-storage" / "a-job").is_dir()
    shutil.rmtree(prepared.output / "jobs-storage")


@of(*RUNTIMES)
def test_every_script_parses_and_every_yaml_file_loads(prepared):
    scripts = [file for file in prepared.output.rglob("*") if file.suffix in (".sh", ".slurm")]
    assert len(scripts) == {"docker": 1, "k8s": 0, "slurm": 2}[prepared.runtime]
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
    charts = {"Chart.yaml", "values.yaml"} if prepared.runtime == "k8s" else set()
    files = {file.name: file for file in prepared.output.rglob("*.yaml") if "templates" not in file.parts}
    assert files.keys() == {"study_runtime.yaml"} | charts
    for file in files.values():
        assert yaml.safe_load(file.read_text())


@of("docker", "k8s")
def test_jobs_get_the_sites_image_its_data_to_read_and_a_state_that_outlives_them(prepared):
    study = study_runtime(prepared)
    assert study.container_image == settings(prepared.runtime)["parent"]["docker_image"]
    assert study.container_image.endswith(f"nnunet-flare:{__version__}")
    raw = {"/data/default/raw": True} if prepared.role == "site" else {}
    assert {mount.mount_path: mount.read_only for mount in study.datasets} == {"/data/default/state": False} | raw


@of("slurm")
def test_slurm_jobs_get_the_sites_folders(prepared):
    assert study_runtime(prepared).env.keys() == {"NNUNET_FLARE_HOME", "nnUNet_raw"}


def study_runtime(prepared):
    return load_study_runtime_file(str(prepared.output / "local" / "study_runtime.yaml"), prepared.runtime)["default"]


def settings(runtime: str) -> dict:
    return yaml.safe_load((INPUTS / f"{runtime}.yaml").read_text())


@of("docker")
def test_the_docker_script_mounts_the_kit_and_publishes_only_the_servers_port(prepared, tmp_path: Path):
    (tmp_path / "docker").write_text('#!/bin/bash\nprintf "%s\\n" "$*" >> "$LOG"\n')
    (tmp_path / "docker").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "LOG": str(tmp_path / "log"),
        "DOCKER_HOST": "tcp://127.0.0.1:1",
        "NVFL_DOCKER_SOCK_GID": "999",
    }
    subprocess.run(["bash", prepared.output / "startup" / "start_docker.sh"], env=environment, check=True)
    calls = (tmp_path / "log").read_text().splitlines()
    started = next(shlex.split(call) for call in calls if call.startswith("run "))
    options = list(pairwise(started))
    assert ("--rm", settings("docker")["parent"]["docker_image"]) in options
    assert ("--user", f"{os.getuid()}:{os.getgid()}") in options
    assert ("--network", "nnunet-flare") in options
    assert [value for option, value in options if option == "-v"] == [f"{prepared.output}:{MOUNT}"]
    assert {value for option, value in options if option == "-p"} == {f"{port}:{port}" for port in prepared.ports}


@of("docker", kits=(SITE,))
def test_a_docker_job_sees_its_own_folder_and_the_data_and_nothing_of_the_host(prepared, monkeypatch):
    launcher = ClientDockerJobLauncher(
        workspace=str(prepared.output), **components(prepared.output)["docker_launcher"]["args"]
    )
    monkeypatch.setattr(launcher, "WORKSPACE_MOUNT", str(prepared.output))
    launched: dict = {}

    def start(image, **options):
        launched.update(options, image=image)
        raise InterruptedError

    launcher._docker_client = SimpleNamespace(containers=SimpleNamespace(run=start))
    context = FLContext()
    context.set_prop(ReservedKey.IDENTITY_NAME, SITE, private=False, sticky=False)
    context.set_prop(FLContextKey.WORKSPACE_OBJECT, Workspace(str(prepared.output), SITE), private=True, sticky=False)
    arguments = {
        JobProcessArgs.EXE_MODULE: ("-m", "nvflare.private.fed.app.client.worker_process"),
        JobProcessArgs.PARENT_URL: ("-p", "stcp://0.0.0.0:8102"),
        JobProcessArgs.PARENT_CONN_SEC: ("-x", "mtls"),
    }
    context.set_prop(FLContextKey.JOB_PROCESS_ARGS, arguments, private=True, sticky=False)
    with pytest.raises(InterruptedError):
        launcher.launch_job({"job_id": "a-job", "study": "default"}, context)

    mounts = {mount["Target"]: (mount["Source"], mount["ReadOnly"]) for mount in launched["mounts"]}
    workspace = str(prepared.output)
    assert mounts == {
        workspace: (None, False),
        f"{workspace}/startup": (f"{workspace}/startup", True),
        f"{workspace}/local": (f"{workspace}/local", True),
        f"{workspace}/a-job": (f"{workspace}/a-job", False),
        "/data/default/raw": ("/srv/nnunet-flare/raw", True),
        "/data/default/state": ("/srv/nnunet-flare/state", False),
    }
    assert launched["user"] == f"{os.getuid()}:{os.getgid()}"
    assert (launched["cap_drop"], launched["security_opt"]) == (["ALL"], ["no-new-privileges"])
    assert launched["device_requests"] == [{"Count": -1, "Capabilities": [["gpu"]]}]


@of("k8s")
def test_the_chart_names_image_claim_ports_and_an_unprivileged_user(prepared):
    values = yaml.safe_load((prepared.output / "helm_chart" / "values.yaml").read_text())
    assert "{repository}:{tag}".format(**values["image"]) == settings("k8s")["parent"]["docker_image"]
    assert values["persistence"]["workspace"]["claimName"] == "nnunet-flare-workspace"
    assert values["securityContext"]["runAsNonRoot"] is True
    assert {values[name] for name in ("fedLearnPort", "adminPort") if name in values} == prepared.ports
    launcher = components(prepared.output)["k8s_launcher"]["args"]
    assert launcher["security_context"] == values["securityContext"]
    assert launcher["namespace"] == "nnunet-flare"


@of("k8s")
def test_staging_puts_the_private_key_into_the_secret_only(prepared, tmp_path: Path):
    (tmp_path / "kubectl").write_text('#!/bin/bash\ncat >> "$LOG"; echo --- >> "$LOG"\n')
    (tmp_path / "kubectl").chmod(0o755)
    kit = shutil.copytree(prepared.output, tmp_path / prepared.name)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "LOG": str(tmp_path / "log")}
    run("nvflare", "deploy", "k8", "stage", kit, "--namespace", "nnunet-flare", folder=tmp_path, **environment)
    applied = {item["kind"]: item for item in yaml.safe_load_all((tmp_path / "log").read_text()) if item}
    data = {
        kind: [base64.b64decode(value) for value in (item.get("data") or item["binaryData"]).values()]
        for kind, item in applied.items()
    }
    assert {kind: sum(b"PRIVATE KEY" in value for value in values) for kind, values in data.items()} == {
        "ConfigMap": 0,
        "Secret": 1,
    }
    assert (prepared.output / "local" / "study_runtime.yaml").read_bytes() in data["ConfigMap"]
    startup = yaml.safe_load((kit / "helm_chart" / "values.yaml").read_text())["workspaceConfig"]["startup"]
    assert startup["secretName"] == applied["Secret"]["metadata"]["name"]


@of("k8s", kits=(SITE,))
def test_a_kubernetes_job_is_unprivileged_and_has_room_for_augmentation_workers(prepared):
    study = study_runtime(prepared)
    job = {"name": "a-job", "image": study.container_image, "container_name": "container-a-job", "command": "module"}
    pod = K8sJobHandle("a-job", None, job, pod_manifest_template=study.pod_template).get_manifest()["spec"]
    [container] = pod["containers"]
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert pod["automountServiceAccountToken"] is False
    assert container["volumeMounts"] == [{"name": "shm", "mountPath": "/dev/shm"}]
    assert pod["volumes"][0]["emptyDir"]["medium"] == "Memory"


@of("k8s")
def test_a_kubernetes_job_gets_the_policy_as_the_site_recorded_it(prepared, tmp_path: Path):
    kit, pod = shutil.copytree(prepared.output, tmp_path / prepared.name), tmp_path / "pod"
    PolicyManifest.write(kit)
    (kit / "a-job").mkdir()
    _zip_workspace_to_file(str(kit), "a-job", str(tmp_path / "workspace.zip"))
    shutil.unpack_archive(tmp_path / "workspace.zip", pod)
    (pod / "startup").mkdir()
    for file in (kit / "startup").iterdir():
        if _keep_startup_file(file.name):
            shutil.copy(file, pod / "startup")
    assert not (pod / "local" / "study_runtime.yaml").exists()
    assert PolicyManifest.check(pod) == PolicyManifest.check(kit)


@of("slurm")
def test_slurm_jobs_run_in_the_prepared_folder(prepared):
    arguments = components(prepared.output)["slurm_launcher"]["args"]
    assert arguments["workspace_path"] == str(prepared.output)
    given = settings("slurm")["job_launcher"]
    assert {name: arguments[name] for name in given} == given
    internal = json.loads((prepared.output / "local" / "comm_config.json").read_text())["internal"]
    assert internal["resources"]["port"] == arguments["internal_port"]


def test_the_image_is_built_from_pinned_versions_by_named_files_and_runs_as_no_root():
    steps = [line.split(maxsplit=1) for line in DOCKERFILE.replace("\\\n", "").splitlines() if line[:1].isupper()]
    assert steps[0] == ["FROM", "python:3.11-slim"]
    assert [value for step, value in steps if step == "USER"][-1].split(":")[0] not in ("0", "root")
    assert not [step for step, _ in steps if step == "ADD"]
    for command in re.findall(r"pip install.*", DOCKERFILE):
        assert "--constraint constraints.txt" in command
    assert [value for step, value in steps if step == "WORKDIR"][-1] == MOUNT
    mounted = dict(re.findall(r"(NNUNET_FLARE_HOME|nnUNet_raw)=(\S+)", DOCKERFILE))
    assert mounted == {"NNUNET_FLARE_HOME": "/data/default/state", "nnUNet_raw": "/data/default/raw"}


def test_the_files_that_the_image_copies_make_the_package(tmp_path: Path):
    copied = [name for line in re.findall(r"^COPY (.+) \./", DOCKERFILE, re.MULTILINE) for name in line.split()]
    ignored = (ROOT / "provisioning" / "Dockerfile.dockerignore").read_text().splitlines()
    assert {f"!{name}" for name in copied} == {line for line in ignored if line.startswith("!")}
    for name in copied:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--target", tmp_path / "installed", tmp_path], check=True)
    code = "import nnunet_flare.cli; print(nnunet_flare.__file__)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.stdout.startswith(str(tmp_path / "installed")), result.stderr
