"""Generated pages are current, and the tables that they are made from are complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper_ray.config import load_config
from esper_ray.runtime import Runtime
from tests.pages import ROOT, blocks, python


def test_generated_pages_are_current() -> None:
    python("-m", "docs.generate", "--check", folder=ROOT, timeout=60)


def test_every_decision_is_in_the_index() -> None:
    index = (ROOT / "docs/adr/README.md").read_text(encoding="utf-8")
    pages = [page.name for page in (ROOT / "docs/adr").glob("[0-9]*.md")]
    assert pages
    assert [name for name in pages if f"({name})" not in index] == []


def run(page: str, more: str, folder: Path) -> str:
    return python("-W", "error", "-c", "\n".join([*blocks(page, "python"), more]), folder=folder)


def test_a_strategy_of_your_own_works_as_it_is_written(tmp_path: Path) -> None:
    told = run("docs/grafting.md", "print(Square().compute_alpha(5, 10, {}))", tmp_path)
    assert told == "0.25\n"


def test_a_blueprint_of_your_own_works_as_it_is_written(tmp_path: Path) -> None:
    more = """
from esper_ray.layers import ChunkedKasminaLayer

layer = ChunkedKasminaLayer(nn.Linear(3, 8), 2, blueprint_name="adapter", hidden=5)
layer.request("germinate", [0, 1])
print(layer.bank.weights_per_seed, layer.seed(1).state.name)
"""
    told = run("docs/growth.md", more, tmp_path)
    assert told == f"{2 * 4 + 4 * 5 + 5 + 5 * 4 + 4} GERMINATED\n"


def test_seeds_in_a_model_of_your_own_work_as_it_is_written(tmp_path: Path) -> None:
    told = run("docs/attach.md", "", tmp_path).splitlines()
    assert told[0].split()[:2] == ["layer", "kind"]
    assert told[1].split()[:3] == ["(model)", "Block", "12"]
    assert told[2:5] == [
        "0: 4 DORMANT",
        "[<Refusal.NONE: 0>, <Refusal.UNKNOWN_SEED: 1>]",
        "{'GERMINATED': 1, 'DORMANT': 3}",
    ]
    assert told[5:] == ["GERMINATED USER", "True", "torch.Size([8, 4])"]


def test_a_part_of_the_event_log_opens_with_pyarrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(
        ROOT / "examples" / "stdlib_lm.yaml", ["train.epochs=1", "data.args.cap_bytes=60000"]
    )
    with Runtime(config, local=True) as runtime:
        runtime.fit("never")
    told = run("docs/events.md", "print(table.num_rows, table.column_names[:3])", tmp_path)
    assert told == "2 ['sequence', 'kind', 'layer']\n"
