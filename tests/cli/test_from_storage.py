"""Runs that are known by their URL alone, and what their checkpoints may not make us do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from esper_ray.storage import manifest

if TYPE_CHECKING:
    from tests.cli.conftest import Command

NEWEST = "commits/00000000000000000004.json"
LONGER = ("--local", "--set", "train.epochs=6", "--json")
MODEL = """\
from pathlib import Path
from esper_ray.models import byte_mlp
Path({mark!r}).write_text("imported")
def model(**args):
    return byte_mlp(**args)
"""


def forge(store: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the newest commit as somebody who may write there, with a true digest."""
    body = manifest.decode((store / NEWEST).read_bytes())
    change(body)
    (store / NEWEST).write_bytes(manifest.encode(body))


def naming(factory: object) -> Callable[[dict[str, Any]], object]:
    return lambda body: body["config"].update({"model.factory": factory})


def test_a_run_goes_on_from_its_url_alone(cli: Command, store: Path, here: Path) -> None:
    (here / "run.yaml").unlink()
    done = cli("train", str(store), *LONGER)
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 12
    assert "at step 10" in done.stderr
    done = cli("train", f"{store}@step=8", "--local", "--set", "train.epochs=5", "--json")
    assert json.loads(done.stdout)["steps"] == 10
    assert "at step 8" in done.stderr


@pytest.mark.parametrize(
    "factory",
    [
        "os:system",
        "subprocess:run",
        "builtins:eval",
        "esper_ray.storage.local_disk:replace",
        "esper_ray.models.mlp:byte_mlp",
        "esper_ray.models:__dict__",
        "esper_ray.models:byte_mlp.__globals__",
        "esper_ray.models:byte_mlp\n",
        "antigravity:x",
        "mine:model",
        "../mine:model",
        "",
    ],
)
def test_a_forged_run_imports_no_module_that_was_not_allowed(
    cli: Command, store: Path, here: Path, factory: str
) -> None:
    (here / "mine.py").write_text(MODEL.format(mark=str(here / "mark")))
    forge(store, naming(factory))
    error, hint = cli("train", str(store), *LONGER).failed(2)
    assert "to be imported and called" in error
    assert "--allow-factory" in hint
    assert not (here / "mark").exists()


def test_a_forged_run_is_not_resumed_by_its_run_file_either(cli: Command, store: Path) -> None:
    forge(store, naming("os:system"))
    error, _ = cli("train", "run.yaml", "--local").failed(2)
    assert "was made with another model.factory" in error


def test_a_model_of_ones_own_is_imported_where_it_is_allowed(
    command: Command, store: Path, here: Path
) -> None:
    (here / "mine.py").write_text(MODEL.format(mark=str(here / "mark")))
    forge(store, naming("mine:model"))
    done = command("train", str(store), *LONGER, "--allow-factory", "other:model")
    assert done.code == 2
    assert not (here / "mark").exists()
    done = command("train", str(store), *LONGER, "--allow-factory", "mine:model")
    assert done.code == 0, done.stderr
    assert (here / "mark").exists()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (naming(None), 4),
        (naming(["os:system"]), 4),
        (lambda body: body["config"].pop("model.factory"), 4),
        (lambda body: body["config"].update({"seeds": 1}), 4),
        (lambda body: body["config"].update({"storage.url": "s3://other/run"}), 2),
        (lambda body: body["config"].update({"seeds.blueprint": "os:system"}), 2),
        (lambda body: body["config"].update({"seeds.grafting.strategy": "os:system"}), 2),
        (lambda body: body["config"].update({"data.name": "os:system"}), 2),
        (lambda body: body["config"].update({"data.args.path": "/etc/passwd"}), 2),
        (lambda body: body["config"].update({"unknown.key": 1}), 2),
    ],
)
def test_forged_settings_are_refused(
    cli: Command, store: Path, change: Callable[[dict[str, Any]], object], code: int
) -> None:
    forge(store, change)
    cli("train", str(store), *LONGER).failed(code)


def test_how_long_to_train_must_be_said(cli: Command, store: Path) -> None:
    _, hint = cli("train", str(store), "--local").failed(2)
    assert hint == "hint: add --set train.epochs=N"


def test_a_factory_is_not_set_past_the_list(cli: Command, store: Path) -> None:
    words = ("--set", "model.factory=os:system")
    assert "cannot be set" in cli("train", str(store), *LONGER, *words).failed(2)[0]


def test_a_folder_that_is_no_run_is_not_found(cli: Command) -> None:
    assert "no run is stored at" in cli("train", ".", *LONGER).failed(3)[0]
