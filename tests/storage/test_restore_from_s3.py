"""The example of a run that is killed and restored from S3, as it is written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from esper_ray.bench.s3_server import S3Server
from esper_ray.storage import RunLog
from tests.pages import ROOT, blocks

PAGE = "examples/restore_from_s3.md"


def follow(page: list[str], server: S3Server, folder: Path) -> str:
    """What the commands of the page print, run by one shell with the page's environment."""
    program = folder / ".venv" / "bin" / "esper-ray"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m esper_ray "$@"\n')
    program.chmod(0o755)
    shutil.copytree(ROOT / "examples", folder / "examples")
    keys = {"AWS_ACCESS_KEY_ID": "testkey", "AWS_SECRET_ACCESS_KEY": "testsecret"}
    env = {**os.environ, **keys, "AWS_DEFAULT_REGION": "us-east-1"}
    env["AWS_ENDPOINT_URL"] = server.endpoint
    done = subprocess.run(
        ["bash", "-eu", "-c", "\n".join(page)],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def check(server: S3Server, folder: Path, told: str, name: str) -> None:
    log = RunLog(server.root(name))
    first, second, third = log.epochs()
    steps = {seq: log.read_commit(seq)["step"] for seq in log.commit_numbers()}
    latest, rewound = log.lineage()
    starts = [epoch.resumed_from for epoch in (first, second, third)]
    assert starts == [None, rewound, rewound]
    assert (steps[latest], steps[rewound], latest) == (320, 160, max(steps))
    assert sorted(steps.values()) == [160, 320, 320]  # the older 320 is stored still, but given up
    assert told.count("resuming s3://esper/") == 2
    assert "steps in" not in (folder / "first.log").read_text()  # it was cut off
    scores = {line for line in told.splitlines() if line.startswith("test: ")}
    assert len(scores) == 1  # the same weights, killed or not, restored once or twice
    assert f"checkpoint: s3://esper/{name}@step=320" in told
    assert told.rstrip().splitlines()[-1].startswith("ok: ")


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_run_is_killed_restored_and_rewound_as_the_page_says(
    weed_server: S3Server, tmp_path: Path
) -> None:
    check(weed_server, tmp_path, follow(blocks(PAGE, "sh"), weed_server, tmp_path), "stdlib-lm")


@pytest.mark.s3
@pytest.mark.ray
@pytest.mark.soak
def test_so_is_a_run_on_ray_actors(weed_server: S3Server, tmp_path: Path) -> None:
    page = [
        block.replace(" --local", "").replace("/stdlib-lm", "/on-ray")
        for block in blocks(PAGE, "sh")
    ]
    check(weed_server, tmp_path, follow(page, weed_server, tmp_path), "on-ray")
