"""The files of cluster/, each against its schema and against the versions that we test with."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

CLUSTER = Path(__file__).parents[2] / "cluster"
CONSTRAINTS = (CLUSTER.parent / "requirements" / "constraints.txt").read_text()
RAY = re.findall(r"^ray==(.*)$", CONSTRAINTS, re.M)[0]
RAY_UP = ("ray-local.yaml", "ray-aws.yaml", "ray-gcp.yaml")
KUBERAY = ("raycluster.yaml", "rayjob.yaml")
SCHEMA = json.loads(Path(__file__).with_name("kuberay_schema.json").read_text())


def read(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def images(value: Any) -> list[str]:
    """Every `image` in nested values."""
    if isinstance(value, list):
        return [found for item in value for found in images(item)]
    if not isinstance(value, dict):
        return []
    here = [value["image"]] if isinstance(value.get("image"), str) else []
    return here + [found for item in value.values() for found in images(item)]


# ------------------------------------------------------------------ ray up


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_takes_the_file(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = read(name)
    assert not {"head_node", "worker_nodes", "min_workers"} & {*config}
    validate_config(prepare_config(config))


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_would_refuse_a_misspelt_key(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config(read(name) | {"max_worker": 1}))


@pytest.mark.parametrize("name", RAY_UP)
def test_nodes_of_ray_up_demand_a_token_and_leave_time_to_stop(name: str) -> None:
    config = read(name)
    starts = {
        key: [line for line in config[key] if "ray start" in line]
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
    }
    for (line,) in starts.values():
        assert "RAY_AUTH_MODE=token" in line
        assert "RAY_JOB_STOP_WAIT_TIME_S=30" in line
        assert "--metrics-export-port=8080" in line
    assert "--dashboard-host=127.0.0.1" in starts["head_start_ray_commands"][0]
    assert any(path.endswith("/.ray/auth_token") for path in config["file_mounts"])
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]


def test_files_that_ray_up_copies_from_here_exist() -> None:
    copied = read("ray-local.yaml")["file_mounts"].values()
    here = [path for path in copied if not path.startswith("~")]
    assert here
    assert [path for path in here if not (CLUSTER.parent / path).exists()] == []
    assert [path for path in here if (CLUSTER.parent / path).is_symlink()] == []


# ------------------------------------------------------------------ KubeRay


def check(document: Any) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(document)


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_file_fits_the_schema(name: str) -> None:
    check(read(name))


def cluster_spec(name: str) -> Any:
    spec = read(name)["spec"]
    return spec["rayClusterSpec"] if name == "rayjob.yaml" else spec


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_pods_demand_a_token_and_leave_time_to_stop(name: str) -> None:
    spec = cluster_spec(name)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == RAY
    pod = spec["headGroupSpec"]["template"]["spec"]
    wait = {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "30"}
    assert wait in pod["containers"][0]["env"]
    assert pod["terminationGracePeriodSeconds"] > 30


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("spec", "rayVersion"), 2.6),
        (("spec", "authOptions", "mode"), "tokens"),
        (("spec", "headGroupSpec", "rayStartParams", "num-gpus"), 0),
        (("spec", "workerGroupSpecs", 0, "replica"), 2),
        (("spec", "workerGroupSpecs", 0, "maxReplicas"), "4"),
        (("spec", "headGroupSpec", "template", "spec", "containers"), []),
        (("kind",), "RayClusters"),
        (("apiVersion",), "ray.io/v1alpha1"),
    ],
)
def test_schema_refuses_what_the_operator_would(where: tuple[Any, ...], value: Any) -> None:
    document = read("raycluster.yaml")
    inside = document
    for key in where[:-1]:
        inside = inside[key]
    inside[where[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check(document)


def test_rayjob_ends_its_cluster_and_goes_on_after_a_loss() -> None:
    spec = read("rayjob.yaml")["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] > 0
    assert "--resume auto" in spec["entrypoint"]
    assert "--set cluster.address=auto" in spec["entrypoint"]
    check_runtime_env(yaml.safe_load(spec["runtimeEnvYAML"]))


# ------------------------------------------------------------------ images, runtime environment


@pytest.mark.parametrize("name", ["ray-aws.yaml", "ray-gcp.yaml", *KUBERAY])
def test_every_image_is_tagged_with_the_version_of_ray_that_we_test(name: str) -> None:
    found = images(read(name))
    assert found
    assert {image.rpartition(":")[2] for image in found} == {RAY}


def test_our_image_is_made_from_that_version_of_ray() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    assert re.findall(r"^FROM rayproject/ray:([\d.]+)-py3(\d+)-gpu$", text, re.M)[0][0] == RAY
    assert f"esper-ray:{RAY} ." in text
    for line in re.findall(r"^COPY --chown=ray (.*) \S+$", text, re.M):
        assert all((CLUSTER.parent / word).exists() for word in line.split()), line


def check_runtime_env(values: dict[str, Any]) -> None:
    from ray.runtime_env import RuntimeEnv

    RuntimeEnv(**values)
    assert values["env_vars"]["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0"


def test_runtime_environment_is_valid_and_leaves_links_and_private_folders_behind() -> None:
    values = read("runtime_env.yaml")
    check_runtime_env(values)
    assert {"/actors", "/storage", ".git", ".venv", "/runs"} <= {*values["excludes"]}


# ------------------------------------------------------------------ Slurm

STUBS = {
    "srun": 'while [[ $1 == -* ]]; do [[ $1 == -w || $1 == -x ]] && shift; shift; done\nexec "$@"',
    "scontrol": 'if [[ $1 == show ]]; then printf "one\\ntwo\\n"; else echo "$@" >>"$SAID"; fi',
    "hostname": "echo 10.0.0.1",
    "ray": 'echo "ray $*" >>"$SAID"; [[ $1 == status ]] || exec sleep 20',
    "esper-ray": (
        'echo "esper-ray $*" >>"$SAID"; stat -c %a "$RAY_AUTH_TOKEN_PATH" >>"$SAID"\n'
        'trap "echo stored >>$SAID; kill %1; exit 143" TERM; sleep "$LASTS" & wait; exit 7'
    ),
}


def directives() -> dict[str, str]:
    lines = (CLUSTER / "slurm.sh").read_text().splitlines()
    found = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (line.partition("=") for line in found)}


def test_slurm_script_is_bash_and_its_directives_are_known() -> None:
    subprocess.run(["bash", "-n", CLUSTER / "slurm.sh"], check=True, timeout=10)
    known = {
        "job-name": r"[a-z-]+",
        "nodes": r"\d+",
        "ntasks-per-node": "1",  # one Ray node per machine
        "cpus-per-task": r"\d+",
        "gpus-per-task": r"\d+",
        "time": r"\d\d:\d\d:\d\d",
        "signal": r"B:TERM@\d+",
        "requeue": "",
        "open-mode": "append|truncate",
    }
    given = directives()
    assert {*given} == {*known}
    assert [n for n, value in given.items() if not re.fullmatch(known[n], value)] == []
    text = (CLUSTER / "slurm.sh").read_text()
    assert text.startswith("#!/bin/bash\n")  # sbatch reads directives up to the first command
    assert text.rindex("#SBATCH") < text.index("set -euo pipefail")


def start_slurm(folder: Path, lasts: str) -> subprocess.Popen[bytes]:
    for name, body in STUBS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o700)
    env = {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "SAID": str(folder / "said"),
        "LASTS": lasts,
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "4",
    }
    command = ["bash", str(CLUSTER / "slurm.sh"), "run.yaml"]
    return subprocess.Popen(command, cwd=folder, env=env, start_new_session=True)


def end_group(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)  # as Slurm ends the steps of a script that is over
    process.wait(10)


def test_slurm_script_starts_nodes_and_returns_the_code_of_the_run(tmp_path: Path) -> None:
    process = start_slurm(tmp_path, "0")
    try:
        assert process.wait(20) == 7
    finally:
        end_group(process)
    said = (tmp_path / "said").read_text().splitlines()
    assert any(line.startswith("ray start --head --block") for line in said)
    assert any(line.startswith("ray start --block --address=10.0.0.1:24711") for line in said)
    run = "esper-ray train run.yaml --resume auto --set cluster.address=10.0.0.1:24711"
    assert run in said
    assert "600" in said  # the mode of the token file
    assert not (tmp_path / ".ray-token-4711").exists()


def test_slurm_warning_lets_the_run_store_itself_and_queues_the_job_again(tmp_path: Path) -> None:
    process = start_slurm(tmp_path, "30")
    try:
        deadline = time.monotonic() + 20
        said = tmp_path / "said"
        while not said.exists() or "600" not in said.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.3)  # the stub's trap is set after what it says
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
    finally:
        end_group(process)
    ends = [word for word in said.read_text().splitlines() if word in ("stored", "requeue 4711")]
    assert ends == ["stored", "requeue 4711"]  # what starts beside them may be said later
