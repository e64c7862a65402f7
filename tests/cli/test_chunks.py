"""`chunks`: the plan of a run file and the seeds of a checkpoint as a picture, or why not."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pytest

from esper_ray import models
from esper_ray.actors.persistence import read_state
from esper_ray.picture import sources
from esper_ray.storage import Root, RunLog, codec, manifest
from esper_ray.storage.commit_log import _RESERVED

if TYPE_CHECKING:
    from tests.cli.conftest import Command, Outcome, Snapshot

Look = Callable[[], "Snapshot"]
LAYERS = ("reader.hidden", "predictor.hidden")
PNG = b"\x89PNG\r\n\x1a\n"


def told(done: Outcome) -> dict[str, Any]:
    assert (done.code, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def layer_row(layer_id: str, **states: int) -> dict[str, Any]:
    return {"layer_id": layer_id, "width": 16, "seeds": 4, "states": states}


def again(store: Path, state: Mapping[str, Any] | None = None, **changes: object) -> None:
    """One more commit of the same, with other values in its manifest; None takes a key away.

    `state` are columns of a layer's state table that are other than before.
    """
    log = RunLog(Root.open(str(store)))
    body = log.read_commit(4)
    log.open_epoch(4)
    parts = {ref.name: ref for ref in manifest.segments(body)}
    if state:
        name = f"layer/{LAYERS[0]}/state"
        table = codec.encode_table({**read_state(log, parts, LAYERS[0]), **state})
        parts[name] = log.put_segment(name, table, "arrow", 4)
    kept = {key: value for key, value in body.items() if key not in _RESERVED} | changes
    kept = {key: value for key, value in kept.items() if value is not None}
    log.commit(5, kept, list(parts.values()))


def config(store: Path, **changes: object) -> dict[str, Any]:
    body = json.loads((store / "commits" / f"{4:020d}.json").read_text())
    return {**body["config"], **changes}


# ------------------------------------------------------------------ what is drawn


@pytest.mark.parametrize("kind", ["html", "png"])
def test_run_file_is_drawn_as_its_plan_and_nothing_is_trained(
    cli: Command, here: Path, everything: Look, kind: str
) -> None:
    before = everything()
    done = cli("chunks", "run.yaml", "--out", f"plan.{kind}")
    assert (done.code, done.stdout, done.stderr) == (0, f"plan.{kind}\n", "")
    data = (here / f"plan.{kind}").read_bytes()
    assert everything() == before | {f"plan.{kind}": data}
    if kind == "png":
        assert data.startswith(PNG)
    else:
        assert data.decode().count("seed 3: features 12 to 16, DORMANT, alpha 0,") == 2


def test_checkpoint_is_drawn_with_the_states_that_it_holds(
    cli: Command, here: Path, store: Path
) -> None:
    body = json.loads(cli("checkpoints", "show", "store@step=4", "--json").stdout)
    found = told(cli("chunks", "store@step=4", "--out", "then.html", "--json"))
    states = body["coordinator"]["seeds"]
    assert found["out"] == "then.html"
    assert found["layers"] == [layer_row(name, **states[name]) for name in LAYERS]
    text = (here / "then.html").read_text()
    assert "run tiny, step 4, epoch 2" in text
    assert f"file://{store}@step=4" in text
    assert text.count(", TRAINING, alpha 0,") == sum(s.get("TRAINING", 0) for s in states.values())


def test_latest_is_the_default(cli: Command, here: Path, store: Path) -> None:
    for source, out in (
        ("store", "a.html"),
        ("store@latest", "b.html"),
        ("store@step=10", "c.html"),
    ):
        assert cli("chunks", source, "--out", out).code == 0
    assert len({(here / name).read_bytes() for name in ("a.html", "b.html", "c.html")}) == 1
    assert "stability" in (here / "a.html").read_text()


def test_one_layer_is_drawn_where_one_is_asked_for(cli: Command, here: Path, store: Path) -> None:
    for source in ("run.yaml", "store"):
        done = cli("chunks", source, "--layer", LAYERS[1], "--out", "one.html", "--json")
        assert [layer["layer_id"] for layer in told(done)["layers"]] == [LAYERS[1]]
        assert LAYERS[0] not in (here / "one.html").read_text()


def test_chunk_sizes_of_a_run_are_those_of_its_checkpoint(cli: Command, here: Path) -> None:
    sizes = ("--set", "seeds.chunk_sizes=[7,1,3,5]", "--set", "train.epochs=1")
    assert cli("train", "run.yaml", "--local", *sizes).code == 0
    assert cli("chunks", "store", "--out", "uneven.html").code == 0
    text = (here / "uneven.html").read_text()
    for bounds in ("0 to 7", "7 to 8", "8 to 11", "11 to 16"):
        assert text.count(f"features {bounds}, ") == 2


def test_run_is_named_or_given_by_its_url(cli: Command, here: Path, finished_run: Path) -> None:
    shutil.copytree(finished_run / "store", here / "runs" / "tiny" / "checkpoints")
    places = ("runs/tiny", "runs/tiny/checkpoints", f"file://{here}/runs/tiny", "tiny")
    for number, source in enumerate((*places, "tiny@step=10")):
        assert cli("chunks", source, "--out", f"{number}.html").code == 0
    assert len({path.read_bytes() for path in here.glob("*.html")}) == 1
    assert cli("checkpoints", "verify", "runs/tiny").code == 0  # for other commands too


def test_no_model_is_built_from_a_checkpoint(
    cli: Command, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a model is built")

    monkeypatch.setattr(models, "byte_mlp", refuse)
    monkeypatch.setattr(sources, "plan_run", refuse)
    assert cli("chunks", "store", "--out", "a.html").code == 0


@pytest.mark.parametrize("source", ["run.yaml", "store"])
def test_ray_is_not_imported(command: Command, store: Path, source: str) -> None:
    prelude = "import sys; sys.modules['ray'] = None"
    done = command("chunks", source, "--out", "a.html", prelude=prelude)
    assert (done.code, done.stdout, done.stderr) == (0, "a.html\n", "")


def test_html_needs_no_matplotlib(command: Command, store: Path) -> None:
    prelude = "import sys; sys.modules['matplotlib'] = None"
    assert command("chunks", "store", "--out", "a.html", prelude=prelude).code == 0
    error, hint = command("chunks", "store", "--out", "a.png", prelude=prelude).failed(2)
    assert "needs matplotlib" in error
    assert hint == "hint: pip install 'esper-ray[report]'"


def test_file_that_is_there_is_written_over(cli: Command, here: Path) -> None:
    (here / "a.html").write_text("old" * 10_000)
    assert cli("chunks", "run.yaml", "--out", "a.html").code == 0
    assert (here / "a.html").read_text().endswith("</html>\n")


# ------------------------------------------------------------------ what cannot be drawn


@pytest.mark.parametrize("out", ["a.svg", "a", "a.html.gz", ".html", "", "png"])
def test_other_kind_of_file_is_refused_before_anything_is_read(
    cli: Command, everything: Look, out: str
) -> None:
    before = everything()
    error, hint = cli("chunks", "absent", "--out", out).failed(2)
    assert repr(out) in error
    assert hint == "hint: end it in .png or .html"
    assert everything() == before


@pytest.mark.parametrize("out", ["nowhere/a.html", "folder.html", "run.yaml/a.html", "a\0.html"])
@pytest.mark.parametrize("form", [(), ("--json",)])
def test_place_that_cannot_be_written_is_refused(
    cli: Command, here: Path, everything: Look, out: str, form: tuple[str, ...]
) -> None:
    (here / "folder.html").mkdir()
    before = everything()
    done = cli("chunks", "run.yaml", "--out", out, *form)
    assert "cannot be written: " in done.failed(2)[0]
    assert done.stdout == ""
    assert everything() == before


@pytest.mark.parametrize("source", ["run.yaml", "store"])
def test_unknown_layer_is_refused_with_the_nearest_names(
    cli: Command, store: Path, everything: Look, source: str
) -> None:
    before = everything()
    error, hint = cli("chunks", source, "--layer", "reader.hiden", "--out", "a.html").failed(2)
    assert error == "error: no layer 'reader.hiden' carries seeds"
    assert hint == "hint: the nearest are reader.hidden, predictor.hidden"
    assert everything() == before


@pytest.mark.parametrize("words", [("run.yaml",), ("--out", "a.html"), ()])
def test_words_that_are_missing_are_usage_errors(cli: Command, words: tuple[str, ...]) -> None:
    done = cli("chunks", *words)
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: ")


def test_bad_run_file_is_a_bad_run_file(cli: Command, here: Path) -> None:
    (here / "bad.yaml").write_text("run: tiny\nsedes: {}\n")
    assert "sedes" in cli("chunks", "bad.yaml", "--out", "a.html").failed(2)[0]
    assert "absent.yaml" in cli("chunks", "absent.yaml", "--out", "a.html").failed(2)[0]


def test_commit_of_an_older_version_says_what_to_do(cli: Command, store: Path) -> None:
    again(store, widths=None)
    error, hint = cli("chunks", "store", "--out", "a.html").failed(2)
    assert "does not say how wide its layers are" in error
    assert "draw the plan of its run file" in hint
    assert cli("chunks", "store@step=8", "--out", "a.html").code == 0


@pytest.mark.parametrize(
    ("widths", "problem"),
    [
        ([16, 16], "no width of layer 'reader.hidden'"),
        ({"reader.hidden": 16}, "no width of layer 'predictor.hidden'"),
        (dict.fromkeys(LAYERS, "16"), "no width of layer"),
        (dict.fromkeys(LAYERS, True), "no width of layer"),
        (dict.fromkeys(LAYERS, 0), "no width of layer"),
        (dict.fromkeys(LAYERS, 2**40), "no width of layer"),
        (dict.fromkeys(LAYERS, 3), "cannot divide 3 features among 4 seeds"),
    ],
)
def test_widths_that_cannot_be_are_damage(
    cli: Command, store: Path, widths: object, problem: str
) -> None:
    again(store, widths=widths)
    assert problem in cli("chunks", "store", "--out", "a.html").failed(4)[0]


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("seeds.chunk_sizes", [4, 4, 4], "do not divide 16 features among 4 seeds"),
        ("seeds.chunk_sizes", "4444", "no list of numbers"),
        ("seeds.chunk_sizes", [4, 4, 4, "4"], "no list of numbers"),
        ("lifecycle.error_limit", None, "no number"),
    ],
)
def test_settings_that_cannot_be_are_damage(
    cli: Command, store: Path, key: str, value: object, problem: str
) -> None:
    again(store, config=config(store, **{key: value}))
    assert problem in cli("chunks", "store", "--out", "a.html").failed(4)[0]


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        ({"lifecycle_state": np.full(4, 11, np.int32)}, "a lifecycle state is not in 0..10"),
        ({"alpha": np.full(4, np.nan, np.float32)}, "an alpha is not in [0, 1]"),
        ({"seed_id": np.zeros(4, np.int32)}, "seed ids are not 0..3"),
    ],
)
def test_state_that_a_resume_would_refuse_is_damage(
    cli: Command, store: Path, state: dict[str, Any], problem: str
) -> None:
    again(store, state)
    assert problem in cli("chunks", "store", "--out", "a.html").failed(4)[0]


@pytest.mark.parametrize("settings", [None, [], {}])
def test_settings_that_are_missing_are_damage(cli: Command, store: Path, settings: object) -> None:
    again(store, config=settings)
    assert "does not hold the setting" in cli("chunks", "store", "--out", "a.html").failed(4)[0]


def test_missing_extra_writes_nothing(
    cli: Command, store: Path, everything: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    before = everything()
    cli("chunks", "store", "--out", "a.png").failed(2)
    assert everything() == before
