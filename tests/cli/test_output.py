"""What commands print: one JSON document or text, help, exit codes of success."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from esper_ray import bench

if TYPE_CHECKING:
    from tests.cli.conftest import Command, Outcome

TRAIN_KEYS = [
    "run",
    "status",
    "steps",
    "wall_s",
    "eval",
    "seeds",
    "states_visited",
    "transitions",
    "checkpoint",
]


def only_document(done: Outcome) -> dict[str, Any]:
    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    assert done.code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout, parse_constant=refuse)
    return found


# ------------------------------------------------------------------ train


def test_train_prints_one_document_with_exactly_these_keys(cli: Command) -> None:
    done = cli("train", "run.yaml", "--local", "--json")
    found = only_document(done)
    assert list(found) == TRAIN_KEYS
    assert (found["run"], found["status"], found["steps"]) == ("tiny", "completed", 10)
    assert list(found["eval"]) == ["bits_per_byte", "loss", "accuracy", "samples"]
    assert found["eval"]["bits_per_byte"] == pytest.approx(found["eval"]["loss"] / math.log(2))
    assert sum(found["seeds"]["reader.hidden"].values()) == 4
    assert found["states_visited"][:4] == ["DORMANT", "GERMINATED", "TRAINING", "GRAFTING"]
    assert found["transitions"] >= 8 * 4
    epochs = [line for line in done.stderr.splitlines() if line.startswith("epoch ")]
    assert len(epochs) == 5


def test_train_ends_with_a_summary(cli: Command, here: Path) -> None:
    lines = cli("train", "run.yaml", "--local").stdout.splitlines()
    assert lines[0].startswith("tiny: 10 steps in ")
    assert lines[1].startswith("test: bits_per_byte ")
    assert lines[-2] == f"checkpoint: file://{here}/store@step=10"
    assert lines[-1] == (
        f"restore: esper-ray train run.yaml --local --resume file://{here}/store@step=10"
    )
    assert any(line.startswith("not at default: delta_ratio_max 100.0") for line in lines)


# ------------------------------------------------------------------ plan


def test_plan_shows_what_would_be_placed_and_starts_nothing(cli: Command, here: Path) -> None:
    found = only_document(cli("plan", "run.yaml", "--json"))
    assert found["run"] == "tiny"
    assert [actor["stage"] for actor in found["actors"]] == ["reader", "predictor"]
    layers = {layer["layer_id"]: layer for layer in found["layers"]}
    assert list(layers) == ["reader.hidden", "predictor.hidden"]
    assert (layers["reader.hidden"]["width"], layers["reader.hidden"]["chunk"]) == (16, 4)
    assert layers["reader.hidden"]["host_parameters"] == 16 * 16 + 16
    assert found["storage"] == "store"
    assert not (here / "store").exists()


def test_plan_as_text_names_every_layer(cli: Command) -> None:
    done = cli("plan", "run.yaml", "--set", "cluster.address=10.0.0.1:6379")
    assert done.code == 0
    assert "2 LayerActors (reader, predictor), 1 CPU each, on a 10.0.0.1:6379" in done.stdout
    assert "predictor.hidden  predictor  Sequential  16" in done.stdout


# ------------------------------------------------------------------ checkpoints


def test_list_shows_commits_newest_first(cli: Command, store: Path) -> None:
    found = only_document(cli("checkpoints", "list", "store", "--json"))
    assert found["url"] == "store"
    rows = found["checkpoints"]
    assert [(row["seq"], row["status"]) for row in rows] == [(n, "ok") for n in (4, 3, 2, 1)]
    assert [row["step"] for row in rows] == sorted((r["step"] for r in rows), reverse=True)
    text = cli("checkpoints", "list", "store").stdout.splitlines()
    assert text[0].split() == list(rows[0])
    assert len(text) == 5


def test_list_of_a_run_that_never_committed_is_empty(cli: Command, store: Path) -> None:
    for manifest in (store / "commits").iterdir():
        manifest.unlink()
    assert cli("checkpoints", "list", "store").stdout == "no checkpoints\n"
    assert only_document(cli("checkpoints", "list", "store", "--json"))["checkpoints"] == []


def test_show_describes_a_commit(cli: Command, store: Path) -> None:
    found = only_document(cli("checkpoints", "show", "store@step=8", "--json"))
    assert (found["run"], found["step"], found["epoch"]) == ("tiny", 8, 4)
    text = cli("checkpoints", "show", "store@step=8").stdout
    assert text.startswith("run tiny, step 8, epoch 4, written ")
    for ref in found["segments"]:
        assert f"{ref['name']} " in text
        assert ref["sha256"][:16] in text


def test_verify_of_a_whole_run_finds_nothing(cli: Command, store: Path) -> None:
    assert only_document(cli("checkpoints", "verify", "store", "--json")) == {
        "url": "store",
        "problems": [],
    }
    assert cli("checkpoints", "verify", "store").stdout.startswith("ok: every object at store")


def test_verify_reports_damage_as_one_document_too(cli: Command, store: Path) -> None:
    (store / "FORMAT.json").write_bytes(b"{}")
    done = cli("checkpoints", "verify", "store", "--json")
    done.failed(4)
    assert [p["object"] for p in json.loads(done.stdout)["problems"]] == ["FORMAT.json"]


def test_foreign_file_is_noted_and_is_no_damage(cli: Command, store: Path) -> None:
    (store / "notes.txt").write_text("mine")
    done = cli("checkpoints", "verify", "store")
    assert done.code == 0
    assert done.stdout.startswith("note: notes.txt: ")


# ------------------------------------------------------------------ bench


def row(value: float, target: float | None) -> bench.Row:
    return bench.make_row("speed", value, "ms/step", target)


@pytest.fixture
def quick_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = {"met": lambda: [row(1.0, None), row(2.0, 3.0)], "missed": lambda: [row(4.0, 3.0)]}
    monkeypatch.setattr(bench, "BENCHES", fast)


@pytest.mark.parametrize(
    ("name", "strict", "code"),
    [("met", True, 0), ("met", False, 0), ("missed", True, 1), ("missed", False, 0)],
)
@pytest.mark.usefixtures("quick_bench")
def test_strict_bench_exits_1_where_a_row_misses_its_target(
    cli: Command, name: str, strict: bool, code: int
) -> None:
    for words in ([], ["--json"]):
        done = cli("bench", name, *words, *(["--strict"] if strict else []))
        assert done.code == code
        assert done.stderr == ""
    found = json.loads(done.stdout)
    assert list(found) == ["bench", "hardware", "rows"]
    assert all(list(r) == ["name", "value", "unit", "target", "met"] for r in found["rows"])


def test_number_that_is_not_finite_is_null_in_json(
    cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "BENCHES", {"broken": lambda: [row(math.nan, None)]})
    assert only_document(cli("bench", "broken", "--json"))["rows"][0]["value"] is None


@pytest.mark.usefixtures("quick_bench")
def test_bench_table_marks_what_is_missed(cli: Command) -> None:
    title, header, line = cli("bench", "missed").stdout.splitlines()
    assert title.startswith("bench missed on ")
    assert "cores" in title
    assert header.split() == ["row", "value", "unit", "target", "met"]
    assert line.split() == ["speed", "4.000", "ms/step", "<=", "3", "MISSED"]


# ------------------------------------------------------------------ help

OPTIONS = {
    ("train",): ["CONFIG", "--local", "--resume", "--set", "--json", "--debug"],
    ("plan",): ["CONFIG", "--set", "--json", "--debug"],
    ("checkpoints", "list"): ["URL", "--json", "--debug"],
    ("checkpoints", "show"): ["URL", "--json", "--debug"],
    ("checkpoints", "verify"): ["URL", "--quick", "--replica", "--json", "--debug"],
    ("checkpoints", "copy"): ["URL", "URL2", "--json", "--debug"],
    ("checkpoints", "repair"): ["URL", "--from", "--grace", "--json", "--debug"],
    ("checkpoints", "pin"): ["URL", "NAME", "--json", "--debug"],
    ("checkpoints", "prune"): [
        *("URL", "--keep-last", "--keep-every", "--grace", "--alone", "--dry-run", "--json"),
        "--debug",
    ],
    ("checkpoints", "unpin"): ["URL", "NAME", "--json", "--debug"],
    ("explain",): ["RUN", "--layer", "--seed", "--json", "--debug"],
    ("bench",): ["NAME", "--json", "--strict", "--debug"],
    ("checkpoints",): ["list", "show", "verify", "pin", "unpin", "prune", "copy", "repair"],
    (): ["train", "plan", "checkpoints", "explain", "bench", "--version"],
}


@pytest.mark.parametrize("words", OPTIONS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_names_every_option(cli: Command, words: tuple[str, ...], flag: str) -> None:
    done = cli(*words, flag)
    assert done.code == 0
    for option in OPTIONS[words]:
        assert option in done.stdout


def test_version_is_the_package_version(cli: Command) -> None:
    import esper_ray

    assert cli("--version").stdout == f"esper-ray, version {esper_ray.__version__}\n"


LOADED = """
import atexit, sys
heavy = ("torch", "ray", "pyarrow", "numpy", "pydantic")
atexit.register(lambda: print("heavy:", [name for name in heavy if name in sys.modules]))
"""


@pytest.mark.parametrize(
    "words", [("--help",), ("train", "--help"), ("checkpoints", "show", "-h"), ("explain", "-h")]
)
def test_help_loads_nothing_heavy(command: Command, words: tuple[str, ...]) -> None:
    done = command(*words, prelude=LOADED)
    assert done.code == 0
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_config_error_is_found_before_torch_is_loaded(command: Command) -> None:
    done = command("train", "run.yaml", "--set", "nonsense=1", prelude=LOADED)
    assert done.code == 2
    loaded = done.stdout.splitlines()[-1]
    assert "torch" not in loaded
    assert "ray" not in loaded
