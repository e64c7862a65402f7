"""The README's Python runs as it stands, and its links and commands exist."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from click import Group

from esper_ray.cli import main

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    script = "\n".join([*blocks("python"), "print(len(two_stages(16)))"])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("64 {")
    assert lines[1:] == ["0 NONE", "99 UNKNOWN_SEED", "2"]


def test_the_model_of_the_readme_runs(tmp_path: Path) -> None:
    (tmp_path / "mymodel.py").write_text(blocks("python")[-1])
    (tmp_path / "mine.yaml").write_text(blocks("yaml")[0])
    done = subprocess.run(
        [sys.executable, "-m", "esper_ray", "train", "mine.yaml", "--local"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "mine: 16 steps" in done.stdout


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
    shown = blocks("text")[0]
    assert "@@" not in TEXT
    assert "epoch" in shown
    assert "FOSSILIZED" in shown
    assert "bin/esper-ray train examples/stdlib_lm.yaml --resume" in shown
