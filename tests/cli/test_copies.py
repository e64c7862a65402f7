"""`esper-ray checkpoints copy|repair|verify --replica`, and a run that has a replica."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.cli.conftest import Command

LAST = "commits/00000000000000000004.json"


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_a_run_is_copied_damaged_and_repaired(cli: Command, store: Path) -> None:
    copied = cli("checkpoints", "copy", "store", "copy")
    assert copied.stdout.endswith("bytes, were copied; 0 were there\n")
    whole = files(store)
    assert files(store.parent / "copy") == whole
    report = json.loads(cli("checkpoints", "copy", "store", "copy", "--json").stdout)
    assert (report["written"], report["present"]) == ([], len(whole))
    for path in whole:
        (store / path).write_bytes(b"damaged")
    (store / LAST).unlink()
    cli("checkpoints", "verify", "store").failed(4)
    repaired = cli("checkpoints", "repair", "store", "--from", "copy")
    assert repaired.code == 0, repaired.stderr
    assert repaired.stdout.endswith(f"ok: {len(whole)} objects were healed, no damage is left\n")
    assert files(store) == whole
    assert cli("checkpoints", "verify", "store", "--replica", "copy").code == 0


def test_what_no_replica_has_is_left_and_named(cli: Command, store: Path) -> None:
    cli("checkpoints", "copy", "store", "copy")
    path = next(path for path in files(store) if path.startswith("segments/"))
    for folder in ("store", "copy"):
        (store.parent / folder / path).write_bytes(b"damaged")
    done = cli("checkpoints", "repair", "store", "--from", "copy", "--json")
    assert [p["object"] for p in json.loads(done.stdout)["left"]] == [path]
    done = cli("checkpoints", "repair", "store", "--from", "copy")
    assert done.failed(4) == (
        "error: 1 damaged objects are left at store",
        "hint: name another replica by --from",
    )
    assert done.stdout.startswith(f"damage: {path}: ")
    assert cli("checkpoints", "repair", "store").code == 2  # from where?
    cli("checkpoints", "repair", "store", "--from", "absent").failed(3)


def test_a_replica_is_compared_with_its_run(cli: Command, store: Path) -> None:
    cli("checkpoints", "copy", "store@step=4", "copy")
    shown = cli("checkpoints", "verify", "store", "--replica", "copy")
    assert shown.code == 0
    assert f"copy/{LAST}: is not copied" in shown.stdout
    cli("checkpoints", "copy", "store", "whole")
    (store / LAST).unlink()
    shown = cli("checkpoints", "verify", "store", "--replica", "whole")
    shown.failed(4)
    assert f"whole/{LAST}: is lost at file://" in shown.stdout
    found = (path for path in (store.parent / "whole/epochs").iterdir())
    next(found).write_bytes((store / LAST.replace("4.", "2.")).read_bytes())
    shown = cli("checkpoints", "verify", "store", "--replica", "whole")
    assert "belongs to another run or history" in shown.stdout


def test_a_run_says_what_it_took_from_its_replica(cli: Command, store: Path) -> None:
    given = ("train", "run.yaml", "--local", "--set", "storage.replicas=[copy]")
    assert cli(*given).code == 0
    whole = files(store.parent / "copy")
    assert whole == files(store)
    name = next(path for path in sorted(whole) if path.startswith("log/"))
    for path in (LAST, name):
        (store / path).write_bytes(b"damaged")
    resumed = cli(*given, "--set", "train.epochs=6")
    assert resumed.code == 0, resumed.stderr
    assert f"{LAST} is missing or damaged and was read from file://" in resumed.stderr
    assert "`esper-ray checkpoints repair` mends this" in resumed.stderr
    (store.parent / "copy" / LAST).unlink()
    assert cli("checkpoints", "repair", "store", "--from", "copy").failed(4)[0].startswith("error")
