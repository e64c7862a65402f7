"""The README's Python runs as it stands, and its links and commands exist."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from click import Group

from esper_ray.cli import main
from tests.pages import ROOT, blocks, python

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    script = "\n".join([*blocks("README.md", "python"), "print(len(two_stages(16)))"])
    told = python("-W", "error", "-c", script, folder=tmp_path)
    lines = told.splitlines()
    assert lines[0].startswith("layer ")
    assert lines[1].split()[:4] == ["0", "Linear", "128", "16"]
    assert lines[2].startswith("0: ")
    assert lines[3].startswith("64 {")
    assert lines[4:] == ["0 NONE", "99 UNKNOWN_SEED", "2"]


def test_the_model_of_the_readme_runs(tmp_path: Path) -> None:
    (tmp_path / "mymodel.py").write_text(blocks("README.md", "python")[-1])
    (tmp_path / "mine.yaml").write_text(blocks("README.md", "yaml")[0])
    told = python("-m", "esper_ray", "train", "mine.yaml", "--local", folder=tmp_path)
    assert "mine: 16 steps" in told


def test_every_command_of_the_readme_exists() -> None:
    commands = re.findall(r"bin/esper-ray (\w+)(?: (\w+))?", TEXT)
    assert commands
    for name, sub in commands:
        command = main.commands[name]
        assert not isinstance(command, Group) or sub in command.commands


def test_every_link_of_the_documentation_leads_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    broken = [
        f"{page.name}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert broken == []


def test_the_first_screen_is_real_output() -> None:
    shown = blocks("README.md", "text")[0]
    assert "@@" not in TEXT
    assert "epoch" in shown
    assert "FOSSILIZED" in shown
    assert "bin/esper-ray train examples/stdlib_lm.yaml --resume" in shown
