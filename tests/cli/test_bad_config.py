"""Run files and `--set` that cannot be used: exit 2, the value named, nothing written.

A row is run in this process; some are run once more as a process of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from esper_ray.lifecycle.gates import RANGES

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
    ("storage.url=sftp://host/run", r"sftp://host/run needs a package"),
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


# (override, what the error says, what of the value it or the hint names)
BAD_CHOICES = [
    # grafting
    ("seeds.grafting.selection={mode: ab, arms: [linear, glue]}", "no grafting strategy", "'glue'"),
    ("seeds.grafting.selection={mode: ab}", "needs arms, got none", "'ab'"),
    ("seeds.grafting.selection={mode: bandit}", "needs arms, got none", "'bandit'"),
    ("seeds.grafting.selection={arms: [linear, linear]}", "arms must not repeat", "'linear'"),
    ("seeds.grafting.selection={arms: linear}", "valid list", "'linear'"),
    ("seeds.grafting.selection={mode: best}", "selection.mode: .*'bandit'", "'best'"),
    ("seeds.grafting.selection={arm: [linear]}", "the nearest is 'arms'", "selection.arm"),
    ("seeds.grafting.selection={improving_epochs: 256}", "improving_epochs: .*255", "256"),
    ("seeds.grafting.selection={cooldown_epochs: 0}", "cooldown_epochs: .*greater than", "0"),
    ("seeds.grafting.selection={improving_delta: 1.5}", "improving_delta: .*less than", "1.5"),
    ("seeds.grafting.resume=later", "grafting.resume: .*'jump' or 'continue'", "'later'"),
    ("seeds.grafting.drift_unit=year", "drift_unit: .*'step' or 'epoch'", "'year'"),
    ("seeds.grafting.ramp_epochs=16384", "ramp_epochs: .*16383", "16384"),
    ("seeds.grafting.pause_epochs=40000", "pause_epochs: .*32767", "40000"),
    ("seeds.grafting.check_every=0", "check_every: .*greater than", "0"),
    ("seeds.grafting.momentum_factor=2.5", "momentum_factor: .*less than", "2.5"),
    ("seeds.grafting.adaptive_drift=0", "adaptive_drift: .*greater than", "0"),
    ("seeds.grafting.loss_variance_max=-1", "loss_variance_max: .*greater than", "-1"),
    # chunks
    ("seeds.chunk_sizes=[4, 4, 4]", "do not divide 16 features among 4 seeds", "3 chunk sizes"),
    ("seeds.chunk_sizes=[4, 4, 4, 5]", "do not divide 16 features among 4 seeds", "sum 17"),
    ("seeds.chunk_sizes=[]", "do not divide 16 features among 4 seeds", "0 chunk sizes"),
    ("seeds.chunk_sizes=[16, 0, 0, 0]", "chunk_sizes.1: .*greater than", "0"),
    ("seeds.chunk_sizes=[20, -4, 0, 0]", "chunk_sizes.1: .*greater than", "-4"),
    ("seeds.chunk_sizes=[4.5, 4, 4, 3]", "chunk_sizes.0: .*valid integer", "4.5"),
    ("seeds.chunk_sizes=4", "seeds.chunk_sizes: .*valid list", "4"),
    # gates
    *[
        (f"lifecycle.gates={{{name}: {value}}}", f"gate threshold {name} is {value}", str(value))
        for name, (low, high) in RANGES.items()
        for value in (float(low) - 1, float(high) * 2)
        if name not in ("cull_error_count", "inconclusive_epochs")
    ],
    ("lifecycle.gates={cull_error_count: 1.5}", "not a whole number from 0", "1.5"),
    ("lifecycle.gates={inconclusive_epochs: -1}", "not a whole number from 0", "-1"),
    # budgets and replanting
    *[
        (f"lifecycle.budgets={{{state}_{where}: {value}}}", f"{state}_{where}: .*greater", value)
        for state in ("training", "grafting")
        for where in ("per_layer", "in_all")
        for value in ("0", "-1")
    ],
    ("lifecycle.budgets={training_in_all: 1.5}", "training_in_all: .*valid integer", "1.5"),
    ("lifecycle.budgets={training: 1}", "the nearest is 'training_in_all'", "budgets.training"),
    ("lifecycle.budgets=2", "lifecycle.budgets: .*dictionary", "2"),
    ("lifecycle.embargo_epochs=-1", "embargo_epochs: .*greater than", "-1"),
    ("lifecycle.replanting=5", "replanting: .*boolean", "5"),
    ("lifecycle.training_timeout=0", "training_timeout: .*greater than", "0"),
    ("lifecycle.minimum_epochs={TRAINING: -3}", "minimum_epochs.TRAINING: .*greater than", "-3"),
    ("lifecycle.minimum_epochs={CULLED: 3}", "unknown name 'CULLED'", "{'CULLED': 3}"),
]


@pytest.mark.parametrize(
    ("override", "reason", "value"), BAD_CHOICES, ids=[v for v, *_ in BAD_CHOICES]
)
def test_bad_choice_is_refused_and_its_value_is_named(
    cli: Command, everything: Look, override: str, reason: str, value: str
) -> None:
    before = everything()
    done = cli(*TRAIN, "--set", override)
    error, hint = done.failed(2)
    assert re.search(reason, error), error
    assert value in f"{error} {hint}"
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
        ("storage.url=sftp://host/run", "needs a package", "paramiko"),
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


@pytest.mark.parametrize("path", ["absent.yaml", "/dev/zero"])
def test_unreadable_run_file_is_a_config_error(cli: Command, path: str) -> None:
    error, _ = cli("train", path).failed(2)
    assert path in error
