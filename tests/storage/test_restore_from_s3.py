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


def check(server: S3Server, told: str, name: str) -> None:
    log = RunLog(server.root(name))
    first, second, third = log.epochs()
    assert (first.resumed_from, second.resumed_from is not None) == (None, True)
    assert "resuming s3://esper/" in told
    assert f"s3://esper/{name}@step=480" in told
    rewound = log.lineage()
    steps = {seq: log.read_commit(seq)["step"] for seq in log.commit_numbers()}
    assert [steps[seq] for seq in rewound] == [320, 160]
    assert 480 in steps.values()  # stored still, but given up
    assert third.resumed_from == rewound[1]
    assert max(steps) == rewound[0]
    assert told.rstrip().splitlines()[-1].startswith("ok: ")


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_run_is_killed_restored_and_rewound_as_the_page_says(
    weed_server: S3Server, tmp_path: Path
) -> None:
    check(weed_server, follow(blocks(PAGE, "sh"), weed_server, tmp_path), "stdlib-lm")


@pytest.mark.s3
@pytest.mark.ray
@pytest.mark.soak
def test_so_is_a_run_on_ray_actors(weed_server: S3Server, tmp_path: Path) -> None:
    page = [
        block.replace(" --local", "").replace("/stdlib-lm", "/on-ray")
        for block in blocks(PAGE, "sh")
    ]
    check(weed_server, follow(page, weed_server, tmp_path), "on-ray")
