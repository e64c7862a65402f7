"""Each row of the issue's "Bad input", on the command line.

A row is run once as a process of its own and, in its variants, in this process.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.cli.conftest import Command, Snapshot

Look = Callable[[], "Snapshot"]
TRAIN = ("train", "run.yaml", "--local")

# ------------------------------------------------------------------ configuration: exit 2

BAD_VALUES = [
    # unknown keys, with the nearest valid one
    ("data.batch_sise=8", r"unknown key 'data.batch_sise'; the nearest is 'batch_size'"),
    ("sedes={}", r"unknown key 'sedes'; the nearest is 'seed"),
    ("seeds.grafting.ramp=1", r"unknown key 'seeds.grafting.ramp'; the nearest is 'ramp_epochs'"),
    ("lifecycle.gates={stability: 1}", r"unknown name 'stability'; the nearest is 'stability_min'"),
    ("lifecycle.minimum_epochs={TRAIN: 1}", r"unknown name 'TRAIN'; the nearest is 'TRAINING'"),
    ("model.args={windw: 4}", r"unexpected keyword argument 'windw'"),
    ("data.args={windw: 4}", r"unexpected keyword argument 'windw'"),
    # wrong types
    ("train.epochs=ten", r"train.epochs: .*valid integer"),
    ("train.epochs=1.5", r"train.epochs: .*valid integer"),
    ("train.epochs=true", r"train.epochs: .*valid integer"),
    ("train.lr=fast", r"train.lr: .*valid number"),
    ("seeds.targets=all", r"seeds.targets: .*valid list"),
    ("data=5", r"data: .*valid dictionary"),
    ("run=[1]", r"run: .*valid string"),
    ("lifecycle.gates={stability_min: true}", r"gates.stability_min: .*valid number"),
    ("lifecycle.sync=false", r"lifecycle.sync: .*True"),
    ("data.args={window: 4.5}", r"stdlib_text cannot use window 4.5"),
    ("data.args={window: wide}", r"stdlib_text cannot use window 'wide'"),
    ("model.args={hidden: 16.5}", r"stage 'reader' cannot be built"),
    # targets
    ("seeds.targets=[reader.hiden]", r"'reader.hiden' matches no module"),
    ("seeds.targets=['*']", r"match '.*' and '.*' inside it"),
    ("seeds.targets=[]", r"seeds.targets: .*at least 1 item"),
    # sizes
    ("seeds.seeds_per_layer=17", r"has 16 features, too few for 17 seeds"),
    ("seeds.seeds_per_layer=1000000000000", r"seeds.seeds_per_layer: .*less than or equal"),
    *[
        (f"{key}={value}", rf"{key}: .*greater than")
        for key in (
            "data.batch_size",
            "data.evaluation_samples",
            "train.epochs",
            "train.lr",
            "train.micro_batches",
            "seeds.seeds_per_layer",
            "seeds.epoch_steps",
            "seeds.hidden",
            "seeds.grafting.ramp_epochs",
            "storage.every_epochs",
            "cluster.threads",
            "cluster.step_timeout_s",
        )
        for value in (0, -1)
    ],
    ("seed=-1", r"seed: .*greater than"),
    ("seeds.lr=-1", r"seeds.lr: .*greater than"),
    ("data.batch_size=1000000000000", r"data.batch_size: .*less than or equal"),
    ("data.batch_size=15", r"15 is not a multiple of train.micro_batches 2"),
    ("data.args={window: 0}", r"cannot use window 0"),
    ("data.args={window: 4, cap_bytes: -1}", r"cap_bytes -1"),
    ("data.args={window: 40000, cap_bytes: 60000}", r"leaves a split empty"),
    ("model.args={window: 4, hidden: -1}", r"stage 'reader' cannot be built"),
    ("model.args={window: 4, hidden: 0}", r"a layer of the model is of size 0"),
    ("model.args={window: 4, embedding: 0}", r"a layer of the model is of size 0"),
    ("model.args={window: 5}", r"cannot take the data set's samples"),
    # numbers that no arithmetic survives
    *[
        (f"{key}={value}", rf"{key}.*finite 64-bit number")
        for key in ("train.lr", "seeds.gradient_step", "seeds.lr", "cluster.step_timeout_s")
        for value in (".nan", ".inf", "-.inf")
    ],
    ("lifecycle.gates={stability_min: .nan}", r"gates.stability_min: .*finite 64-bit"),
    ("data.args={cap_bytes: .inf}", r"data.args.cap_bytes: .*finite 64-bit"),
    (f"data.args={{cap_bytes: {10**30}}}", r"data.args.cap_bytes: .*64-bit"),
    (f"seed={10**30}", r"seed: .*64-bit"),
    # names
    ("run=Not A Name", r"run: must be 1 to 64 of a-z"),
    ("data.name=nowhere", r"no data set is named 'nowhere'"),
    ("model.factory=nowhere:made", r"model.factory 'nowhere:made' cannot be used"),
    ("model.factory=nowhere", r"model.factory 'nowhere' cannot be used"),
    ("model.factory=esper_ray.models:StageFactory", r"model.factory .* cannot be used"),
    ("seeds.blueprint=lego", r"no blueprint is named 'lego'"),
    ("seeds.objective=fame", r"no objective is named 'fame'"),
    ("seeds.objective=reconstruction", r"'reconstruction' does not fit blueprint 'bottleneck'"),
    ("seeds.grafting.strategy=glue", r"no grafting strategy is named 'glue'"),
    # not plain values
    ("data.args={window: [1, 2", r"not valid YAML"),
    ("train.epochs=*five", r"not valid YAML: aliases"),
    ("train.epochs=&five 5", r"not valid YAML: aliases"),
    ("train.epochs=!!int '5'", r"not valid YAML: aliases"),
    ("data.args={window: 1, window: 2}", r"'window' stands twice"),
    ("data.args={1: 2}", r"key 1 is not text"),
    ("train.epochs=2025-13-45", r"not valid YAML"),
    ("data.args={since: 2025-01-02}", r"data.args.since: a date that is neither"),
    ('storage.url="a\\0b"', r"storage.url: .*neither printable"),
    ('run="\\ud800"', r"run: .*neither printable"),
    # --set itself
    ("train.epochs", r"--set 'train.epochs' is not of the form"),
    ("=5", r"--set '=5' is not of the form"),
    ("run.name.first=5", r"'name' holds no keys|'run' holds no keys"),
    # storage
    ("storage.url=' '", r"the storage URL is empty"),
    ("storage.url=gopher://hole/run", r"unknown scheme 'gopher'"),
    ("storage.url=s3://bucket/run", r"s3://bucket/run needs a package"),
    ("storage.url='memory://'", r"names no place"),
    ("storage.url=run.yaml", r"nothing can be stored at .*run.yaml: .* is not a folder"),
    ("storage.url=run.yaml/below/run", r"nothing can be stored at .*run.yaml is not a folder"),
    ("storage.url=/proc/esper", r"cannot write file:///proc/esper"),
]


@pytest.mark.parametrize(("override", "reason"), BAD_VALUES, ids=[v for v, _ in BAD_VALUES])
def test_bad_value_is_refused_with_exit_2_and_nothing_is_written(
    cli: Command, everything: Look, override: str, reason: str
) -> None:
    before = everything()
    done = cli(*TRAIN, "--set", override)
    error, _ = done.failed(2)
    assert re.search(reason, error), error
    assert done.stdout == ""
    assert everything() == before


@pytest.mark.parametrize(
    ("override", "error", "hint"),
    [
        ("data.batch_sise=8", "'batch_size'", "docs/configuration.md"),
        ("train.epochs=ten", "valid integer", "got 'ten'"),
        ("seeds.targets=[reader.hiden]", "matches no module", "nearest: reader.hidden"),
        ("seeds.seeds_per_layer=17", "too few for 17 seeds", "at most 16"),
        ("data.batch_size=0", "greater than", "got 0"),
        ("storage.url=gopher://hole/run", "unknown scheme 'gopher'", "file://"),
        ("storage.url=s3://bucket/run", "needs a package", "esper-ray[s3]"),
        ("storage.url=run.yaml/run", "is not a folder", "another URL"),
    ],
)
def test_bad_value_ends_the_process_with_two_lines_and_no_traceback(
    command: Command, everything: Look, override: str, error: str, hint: str
) -> None:
    before = everything()
    done = command(*TRAIN, "--set", override)
    found_error, found_hint = done.failed(2)
    assert error in found_error
    assert hint in found_hint
    assert done.stdout == ""
    assert everything() == before


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


# ------------------------------------------------------------------ the run file itself

BAD_FILES = {
    "empty": (b"", "holds no keys"),
    "a list": (b"- 1\n", "holds no keys"),
    "no run": (b"seed: 1\n", "the key 'run' is missing"),
    "malformed": (b"run: [\n", "not valid YAML"),
    "two documents": (b"run: a\n---\nrun: b\n", "not valid YAML"),
    "not text": (b"run: \xff\n", "not valid YAML"),
    "control character": (b"run: \x01\n", "not valid YAML"),
    "alias": (b"run: &a x\nseed: *a\n", "aliases"),
    "tag": (b"run: !!python/object/apply:os.getcwd []\n", "tag"),
    "key twice": (b"run: a\nrun: b\n", "'run' stands twice"),
    "too large": (b"run: a\n" + b"#" * 2**20, "larger than 1048576 bytes"),
    "deep": (b"run: " + b"[" * 5_000, "not valid YAML"),
    "deep and whole": (
        b"run: a\ndata: {args: {x: %s1%s}}\n" % (b"[" * 40, b"]" * 40),
        "data.args.x.0.0.0",
    ),
    "long number": (b"run: a\nseed: " + b"9" * 5_000, "not valid YAML"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_unusable_run_file_is_a_config_error(cli: Command, here: Path, name: str) -> None:
    content, reason = BAD_FILES[name]
    (here / "bad.yaml").write_bytes(content)
    done = cli("train", "bad.yaml")
    assert reason in done.failed(2)[0]
    assert done.stdout == ""


@pytest.mark.parametrize("path", ["absent.yaml", ".", "/dev/zero"])
def test_unreadable_run_file_is_a_config_error(cli: Command, path: str) -> None:
    error, _ = cli("train", path).failed(2)
    assert path in error


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


# ------------------------------------------------------------------ nothing stored: exit 3

READERS = [("checkpoints", "show"), ("checkpoints", "verify"), ("checkpoints", "list")]
RESUME = (*TRAIN, "--resume")


@pytest.mark.parametrize("words", [*READERS, RESUME])
@pytest.mark.parametrize("url", ["absent", "file:///tmp/esper-absent/run", "memory://absent/run"])
def test_missing_checkpoint_is_not_found(
    cli: Command, everything: Look, words: tuple[str, ...], url: str
) -> None:
    before = everything()
    done = cli(*words, url)
    assert "stored at" in done.failed(3)[0]
    assert done.stdout == ""
    assert everything() == before


def test_missing_checkpoint_ends_the_process_with_exit_3(
    command: Command, everything: Look
) -> None:
    before = everything()
    done = command("train", "run.yaml", "--resume", "absent@step=4")
    assert "no checkpoint is stored at" in done.failed(3)[0]
    assert done.stdout == ""
    assert everything() == before


@pytest.mark.parametrize("words", [("checkpoints", "show"), RESUME])
@pytest.mark.parametrize("selector", ["step=7", "step=99999999999999999999", "unknown-pin"])
def test_unknown_step_names_those_that_exist(
    cli: Command, store: Path, everything: Look, words: tuple[str, ...], selector: str
) -> None:
    before = everything()
    error, _ = cli(*words, f"store@{selector}").failed(3)
    assert "step=10" in error
    assert everything() == before


@pytest.mark.parametrize("words", [("checkpoints", "show"), RESUME])
def test_run_without_a_manifest_is_not_found(
    cli: Command, store: Path, words: tuple[str, ...]
) -> None:
    for manifest in (store / "commits").iterdir():
        manifest.unlink()
    assert "no checkpoint is stored at" in cli(*words, "store").failed(3)[0]


@pytest.mark.parametrize(
    ("resume", "code"), [("newest", 3), ("@latest", 2), ("", 2), ("ftp//x", 3), ("gopher://x", 2)]
)
def test_resume_that_names_no_checkpoint_is_refused(
    cli: Command, everything: Look, resume: str, code: int
) -> None:
    before = everything()
    cli(*RESUME, resume).failed(code)
    assert everything() == before


# ------------------------------------------------------------------ damage: exit 4

KINDS = {
    "format": "FORMAT.json",
    "epoch record": "epochs/00000001.json",
    "commit": "commits/00000000000000000004.json",
}
SEGMENTS = {
    "state": "layer/reader.hidden/state",
    "weights": "layer/reader.hidden/weights",
    "rollback": "layer/predictor.hidden/rollback",
    "host": "stage1/host",
    "metrics": "metrics",
}
EVERY_KIND = [*KINDS, *SEGMENTS]


def stored_file(store: Path, kind: str) -> Path:
    """The file of that kind that the newest commit needs."""
    if kind in KINDS:
        return store / KINDS[kind]
    body = json.loads((store / KINDS["commit"]).read_text())
    files: dict[str, str] = {ref["name"]: ref["file"] for ref in body["segments"]}
    return store / "segments" / files[SEGMENTS[kind]]


def flip(path: Path, where: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 0x01
    path.write_bytes(data)


@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_flipped_byte_is_found_and_nothing_is_written(
    cli: Command, store: Path, everything: Look, kind: str, where: float
) -> None:
    path = stored_file(store, kind)
    flip(path, where)
    before = everything()
    verified = cli("checkpoints", "verify", "store")
    assert "damaged objects at store" in verified.failed(4)[0]
    assert verified.stdout.startswith(f"damage: {path.relative_to(store)}: ")
    for words in (("checkpoints", "show", "store"), (*RESUME, "store")):
        done = cli(*words)
        assert path.name in done.failed(4)[0]
        assert done.stdout == ""
    assert everything() == before


def test_flipped_byte_ends_the_process_with_exit_4(
    command: Command, store: Path, everything: Look
) -> None:
    path = stored_file(store, "weights")
    flip(path, 0.5)
    before = everything()
    done = command(*RESUME, "store@latest")
    assert path.name in done.failed(4)[0]
    assert done.stdout == ""
    assert everything() == before


@pytest.mark.parametrize("kind", SEGMENTS)
def test_missing_segment_is_damage(cli: Command, store: Path, kind: str) -> None:
    path = stored_file(store, kind)
    path.unlink()
    for words in (("checkpoints", "show"), ("checkpoints", "verify"), RESUME):
        cli(*words, "store").failed(4)
    assert "is missing" in cli(*RESUME, "store").failed(4)[0]


def test_missing_segment_ends_the_process_with_exit_4(command: Command, store: Path) -> None:
    stored_file(store, "state").unlink()
    done = command("checkpoints", "show", "store")
    assert "is missing" in done.failed(4)[0]
    assert done.stdout == ""


@pytest.mark.parametrize("kind", ["format", "epoch record"])
def test_missing_record_is_damage(cli: Command, store: Path, kind: str) -> None:
    stored_file(store, kind).unlink()
    for words in (("checkpoints", "show"), ("checkpoints", "verify"), RESUME):
        cli(*words, "store").failed(4)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_list_marks_what_it_cannot_vouch_for(cli: Command, store: Path, kind: str) -> None:
    flip(stored_file(store, kind), 0.5)
    done = cli("checkpoints", "list", "store")
    if kind in ("format", "epoch record"):
        done.failed(4)
    else:
        rows = done.stdout.splitlines()[1:]
        assert " damaged: " in rows[0]  # older commits may name the same segment
        assert " damaged: " not in rows[-1]


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
