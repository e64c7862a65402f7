"""What a user types and where Ray is, where neither can be used; interrupts and tracebacks."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.cli.conftest import Command, Snapshot

Look = Callable[[], "Snapshot"]
TRAIN = ("train", "run.yaml", "--local")

# ------------------------------------------------------------------ words


@pytest.mark.parametrize("override", ["storage.url=run.yaml/run", "storage.url=gopher://hole/run"])
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_unusable_place_is_refused_before_ray_is_started(
    cli: Command, monkeypatch: pytest.MonkeyPatch, override: str, resume: str
) -> None:
    import ray

    monkeypatch.setattr(ray, "init", None)  # not callable
    cli("train", "run.yaml", "--resume", resume, "--set", override).failed(2)


def test_memory_is_no_place_for_a_run_on_actors(cli: Command) -> None:
    error, hint = cli("train", "run.yaml", "--set", "storage.url=memory://here/run").failed(2)
    assert "memory of one process" in error
    assert "--local" in hint


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_values_are_cut_in_messages(cli: Command, verb: str) -> None:
    for override in (f"train.epochs={'x' * 5_000}", f"{'k' * 5_000}=1", f"{'x' * 5_000}"):
        done = cli(verb, "run.yaml", "--set", override)
        assert max(map(len, done.failed(2))) < 600


def test_debug_adds_the_traceback_and_keeps_the_exit_code(command: Command) -> None:
    done = command(*TRAIN, "--set", "train.epochs=0", "--debug")
    assert done.code == 2
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert done.stderr.splitlines()[-2:] == [
        "error: train.epochs: Input should be greater than or equal to 1",
        "hint: got 0",
    ]


def test_interrupt_exits_130(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("esper_ray.config.load_config", interrupt)
    done = cli("plan", "run.yaml")
    assert (done.code, done.stderr) == (130, "error: interrupted\n")


@pytest.mark.parametrize(
    "words",
    [
        ("train", "run.yaml", "--nonsense"),
        ("train",),
        ("checkpoints", "destroy", "store"),
        ("grow",),
    ],
)
def test_unknown_words_are_usage_errors(cli: Command, words: tuple[str, ...]) -> None:
    done = cli(*words)
    assert done.code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Usage: ")


def test_unknown_bench_lists_the_known_ones(cli: Command) -> None:
    error, hint = cli("bench", "nonsense").failed(2)
    assert "'nonsense'" in error
    assert "step" in hint


# ------------------------------------------------------------------ Ray: exit 5


@pytest.fixture
def closed_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize(
    "address",
    [
        "nonsense",
        ":6379",
        "127.0.0.1:",
        "127.0.0.1:²",
        "127.0.0.1:99999999",
        "☃.invalid:1",
        f"{'x' * 100}.invalid:1",
        "ray://127.0.0.1:port",
    ],
)
def test_address_that_cannot_be_one_is_refused(
    cli: Command, everything: Look, address: str
) -> None:
    before = everything()
    done = cli("train", "run.yaml", "--set", f"cluster.address='{address}'")
    assert address in done.failed(5)[0]
    assert done.stdout == ""
    assert everything() == before


def test_closed_port_ends_the_process_with_exit_5_and_leaves_nothing(
    command: Command, everything: Look, closed_port: int, tmp_path: Path
) -> None:
    before = everything()
    address = f"127.0.0.1:{closed_port}"
    done = command("train", "run.yaml", "--set", f"cluster.address={address}", TMPDIR=str(tmp_path))
    error, hint = done.failed(5)
    assert f"no Ray cluster answers at '{address}'" in error
    assert os.strerror(errno.ECONNREFUSED) in error
    assert "cluster.address" in hint
    assert done.stdout == ""
    assert everything() == before


def test_address_of_the_environment_is_checked_too(
    cli: Command, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed_port}")
    error, _ = cli("train", "run.yaml", "--set", "cluster.address=auto").failed(5)
    assert str(closed_port) in error


HIDE_OTHER_CLUSTERS = """
import functools
import ray._private.services as services
services.find_gcs_addresses = functools.lru_cache(lambda *args: set())
"""


def test_auto_without_a_cluster_ends_with_exit_5_and_leaves_no_process(
    command: Command, everything: Look, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import psutil  # bundled in Ray

    folder = tmp_path_factory.mktemp("ray")
    before = everything()
    words = ("train", "run.yaml", "--set", "cluster.address=auto")
    done = command(*words, prelude=HIDE_OTHER_CLUSTERS, RAY_TMPDIR=str(folder))
    assert "no Ray cluster answers at 'auto'" in done.failed(5)[0]
    assert done.stdout == ""
    assert everything() == before
    serving = [p.pid for p in psutil.process_iter(["cmdline"]) if mentions(p, str(folder))]
    assert serving == []


def mentions(process: object, folder: str) -> bool:
    words = getattr(process, "info", {}).get("cmdline") or []
    return any(folder in word for word in words)
