"""The command line as a user meets it, and one small stored run to look at and to damage."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from esper_ray.cli import main

RUN_FILE = """\
run: tiny
seed: 3
data: {args: {window: 4, cap_bytes: 60000}, batch_size: 16, evaluation_samples: 64}
model: {args: {window: 4, embedding: 4, hidden: 16}}
train: {epochs: 5, lr: 2e-3, micro_batches: 2}
seeds:
  targets: ["*.hidden"]
  seeds_per_layer: 4
  epoch_steps: 2
  blueprint: bottleneck
  hidden: 4
  warmup_steps: 0
  grafting: {strategy: linear, ramp_epochs: 2}
lifecycle:
  germinate_after: 0
  minimum_epochs: {TRAINING: 1, GRAFTING: 2, STABILIZATION: 1, EVALUATING: 1, FINE_TUNING: 1}
  gates: {delta_ratio_max: 100.0, alpha_one_loss_ratio_max: 2.0}
storage: {url: store, every_epochs: 2}
"""
STEPS, COMMITS = 10, 4  # epochs 2 and 4, the epoch in which seeds enter GRAFTING, the last


@dataclass(frozen=True)
class Outcome:
    """What a command printed and how it ended."""

    code: int
    stdout: str
    stderr: str

    def failed(self, code: int) -> tuple[str, str]:
        """Check the form of an expected failure; return its error and its hint."""
        assert self.code == code, self.stderr
        lines = self.stderr.splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("error: "))
        error, *rest = lines[start:]
        assert len(rest) <= 1, self.stderr
        assert all(line.startswith("hint: ") and len(line) > 6 for line in rest), self.stderr
        assert all(line.startswith(_PROGRESS) for line in lines[:start]), self.stderr
        return error, "".join(rest)


_PROGRESS = (
    "data ",
    "epoch ",
    "checkpoint ",
    "nothing is stored at ",
    "resuming ",
    "4 checkpoints ",
)

Command = Callable[..., Outcome]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory that holds `run.yaml`."""
    (tmp_path / "run.yaml").write_text(RUN_FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # commands put the directory in front
    return tmp_path


@pytest.fixture
def cli(here: Path) -> Command:
    """Run a command in this process."""

    def run(*words: str) -> Outcome:
        result = CliRunner().invoke(main, list(words))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def command(here: Path) -> Command:
    """Run a command as a process of its own."""

    def run(*words: str, prelude: str = "", **env: str) -> Outcome:
        program = f"{prelude}\nfrom esper_ray.cli import main\nmain(prog_name='esper-ray')"
        start = ["-c", program] if prelude else ["-m", "esper_ray"]
        done = subprocess.run(
            [sys.executable, *start, *words],
            cwd=here,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run: `run.yaml` and `store`. Tests work on copies of it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "run.yaml").write_text(RUN_FILE)
    words = ["train", str(folder / "run.yaml"), "--local", "--set", f"storage.url={folder}/store"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.stderr
    assert len(list((folder / "store" / "commits").iterdir())) == COMMITS
    return folder


@pytest.fixture
def store(here: Path, finished_run: Path) -> Path:
    """The stored run, copied to where `run.yaml` says."""
    return Path(shutil.copytree(finished_run / "store", here / "store"))


Snapshot = dict[str, bytes]


@pytest.fixture
def everything(here: Path) -> Callable[[], Snapshot]:
    """Every file below the working directory, with its bytes."""

    def look() -> Snapshot:
        files = (path for path in sorted(here.rglob("*")) if path.is_file())
        folders = {f"{p.relative_to(here)}/": b"" for p in here.rglob("*") if p.is_dir()}
        return {str(path.relative_to(here)): path.read_bytes() for path in files} | folders

    return look
