"""What a wheel and an sdist hold, built from a copy of the tracked tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DIST_INFO = f"esper_ray-{PROJECT['version']}.dist-info"


@dataclass(frozen=True, slots=True)
class Built:
    """The tree that was built from, and the names of the files in both archives."""

    source: Path
    wheel: Path
    wheel_names: set[str]
    sdist_names: set[str]

    def package_files(self, folder: str = "esper_ray") -> set[str]:
        """Python files of the package, relative to the tree."""
        paths = (self.source / folder).rglob("*.py")
        return {path.relative_to(self.source).as_posix() for path in paths}


def _copy_tracked_tree(target: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if os.path.lexists(ROOT / name):  # a deletion not yet committed is still listed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout, to know which files belong to the project")
    source = tmp_path_factory.mktemp("tree")
    out = tmp_path_factory.mktemp("dist")
    _copy_tracked_tree(source)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)],
        cwd=out,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        members = {m.name.partition("/")[2] for m in tar.getmembers() if not m.isdir()}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    return Built(source, wheel, names, members)


def test_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    code = {name for name in built.wheel_names if not name.startswith(f"{DIST_INFO}/")}
    assert code == built.package_files() | {"esper_ray/py.typed"}


def test_wheel_has_one_top_level_name(built: Built) -> None:
    assert {name.partition("/")[0] for name in built.wheel_names} == {"esper_ray", DIST_INFO}
    with zipfile.ZipFile(built.wheel) as archive:
        assert archive.read(f"{DIST_INFO}/top_level.txt").decode().split() == ["esper_ray"]


def test_wheel_carries_licence_and_entry_point(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        entry_points = archive.read(f"{DIST_INFO}/entry_points.txt").decode()
        metadata = archive.read(f"{DIST_INFO}/METADATA").decode()
        licence = archive.read(f"{DIST_INFO}/licenses/LICENSE").decode()
    assert "esper-ray = esper_ray.cli:main" in entry_points
    assert "License-Expression: Apache-2.0" in metadata
    assert licence == (ROOT / "LICENSE").read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", ["esper_ray/actors", "esper_ray/storage", "esper_ray"])
def test_sdist_holds_the_folders_behind_the_links(built: Built, folder: str) -> None:
    expected = built.package_files(folder)
    assert expected
    assert expected <= built.sdist_names


def test_sdist_leaves_the_links_out(built: Built) -> None:
    assert not {n for n in built.sdist_names if n.split("/")[0] in {"actors", "storage"}}


def test_sdist_holds_what_a_packager_needs(built: Built) -> None:
    needed = {"LICENSE", "README.md", "CHANGELOG.md", "Makefile", "requirements/constraints.txt"}
    assert needed <= built.sdist_names


def test_root_links_lead_into_the_package() -> None:
    assert {name: os.readlink(ROOT / name) for name in ("actors", "storage")} == {
        "actors": "esper_ray/actors",
        "storage": "esper_ray/storage",
    }
