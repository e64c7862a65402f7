"""Generated pages are current, and the tables that they are made from are complete."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from esper_ray.config import load_config
from esper_ray.runtime import Runtime

ROOT = Path(__file__).parents[1]


def test_generated_pages_are_current() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "docs.generate", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_decision_is_in_the_index() -> None:
    index = (ROOT / "docs/adr/README.md").read_text(encoding="utf-8")
    pages = [page.name for page in (ROOT / "docs/adr").glob("[0-9]*.md")]
    assert pages
    assert [name for name in pages if f"({name})" not in index] == []


def snippets(page: str) -> str:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))


def run(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_strategy_of_your_own_works_as_it_is_written(tmp_path: Path) -> None:
    told = run(f"{snippets('grafting.md')}\nprint(Square().compute_alpha(5, 10, {{}}))", tmp_path)
    assert told == "0.25\n"


def test_a_part_of_the_event_log_opens_with_pyarrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(
        ROOT / "examples" / "stdlib_lm.yaml", ["train.epochs=1", "data.args.cap_bytes=60000"]
    )
    with Runtime(config, local=True) as runtime:
        runtime.fit("never")
    told = run(f"{snippets('events.md')}\nprint(table.num_rows, table.column_names[:3])", tmp_path)
    assert told == "2 ['sequence', 'kind', 'layer']\n"
