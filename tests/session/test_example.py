"""The example runs, and its seeds go through their whole life."""

from __future__ import annotations

from pathlib import Path

from tests.pages import ROOT, python


def test_the_plain_loops_grow_both_models(tmp_path: Path) -> None:
    example = str(ROOT / "examples" / "attach_plain_loop.py")
    told = python("-W", "error", example, folder=tmp_path)
    ends = [line for line in told.splitlines() if line.startswith(("transformer:", "convnet:"))]
    assert len(ends) == 2
    assert all("FOSSILIZED" in line for line in ends)
    assert "step  300  loss" in told
