"""Rules of the house that a checker can hold: sizes, docstrings, import walls, light imports."""

from __future__ import annotations

import ast
import importlib
import json
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import esper_ray

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "esper_ray"
SOURCES = sorted(PACKAGE.rglob("*.py"))
COMPOSITION = {
    "planning",
    "runtime",
    "console",
    "explain",
    "picture",
    "bench",
    "terminal",
    "checkpoint_commands",
    "run_commands",
    "job_commands",
    "jobs",
    "event_commands",
    "tail",
    "cli",
    "__main__",
}  # may see everything
LONGEST_FUNCTION = 60
LONGEST_FILE = 300
Function = ast.FunctionDef | ast.AsyncFunctionDef


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _functions(path: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, Function):
            yield node


def test_no_function_is_longer_than_sixty_lines_but_a_kernel() -> None:
    # What a kernel would hand to another function, its registers, is most of what it has.
    long = {
        f"{_name(path)}:{node.lineno} {node.name}": lines
        for path in SOURCES
        if not path.name.startswith("triton_")
        for node in _functions(path)
        if (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > LONGEST_FUNCTION
    }
    assert long == {}


def test_no_file_is_longer_than_three_hundred_lines() -> None:
    sizes = {_name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name: lines for name, lines in sizes.items() if lines > LONGEST_FILE} == {}


def test_every_module_has_a_docstring() -> None:
    trees = {_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert [name for name, tree in trees.items() if not ast.get_docstring(tree)] == []


def test_import_walls_stand() -> None:
    command = shutil.which("lint-imports", path=sysconfig.get_path("scripts"))
    assert command, "lint-imports is missing: make setup"
    done = subprocess.run(
        [command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("contract", "exempt"),
    [
        ("ray", {"actors"} | COMPOSITION),
        ("fsspec", {"storage"}),
        ("pyarrow", {"storage", "events"}),
        ("config", {"config", "session"} | COMPOSITION),
        ("data-models", {"data", "models", "actors", "growth", "session", "legacy"} | COMPOSITION),
    ],
)
def test_each_wall_names_every_part_of_the_package(contract: str, exempt: set[str]) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = {c["id"]: c for c in settings["tool"]["importlinter"]["contracts"]}
    walled = {name.removeprefix("esper_ray.") for name in contracts[contract]["source_modules"]}
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert walled == (packages | modules) - exempt


def test_lifecycle_imports_the_standard_library_and_numpy_only() -> None:
    allowed = {*sys.stdlib_module_names, "numpy", "esper_ray.lifecycle", "esper_ray.errors"}
    foreign = []
    for path in (PACKAGE / "lifecycle").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                parts = name.split(".")
                if parts[0] not in allowed and ".".join(parts[:2]) not in allowed:
                    foreign.append(f"{_name(path)}: {name}")
    assert foreign == []


@pytest.mark.parametrize("module", ["esper_ray", "esper_ray.cli"])
def test_import_loads_neither_torch_nor_ray(module: str) -> None:
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    loaded = json.loads(done.stdout)
    assert module in loaded
    assert {"torch", "ray"} & set(loaded) == set()


@pytest.mark.parametrize("name", esper_ray.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(esper_ray, name) is not None


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        importlib.import_module("esper_ray").no_such_name  # noqa: B018
