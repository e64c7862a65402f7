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
    assert done.stdout.splitlines()[0].startswith("64 {")
    assert done.stdout.splitlines()[-1] == "2"


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
