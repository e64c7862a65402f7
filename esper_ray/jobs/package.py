"""What a job uploads: its run file and the source files of named modules, and nothing else."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

import yaml

from esper_ray.config import RunConfig
from esper_ray.errors import ConfigError
from esper_ray.jobs.secrets import secret_names

RUN_FILE: Final = "run.yaml"
MOST_BYTES: Final = 16 << 20
"""Source files are small: more than this is something that was not meant."""


@dataclass(frozen=True, slots=True)
class Package:
    """A run file, and source files of this machine by their place in the job's directory.

    `installed` names the modules that the cluster must have, `unnamed` those that an uploaded file
    imports from beside it and that stay here.
    """

    run_file: bytes
    sources: Mapping[str, Path]
    installed: tuple[str, ...]
    unnamed: tuple[str, ...]

    @property
    def digest(self) -> str:
        """sha256 of the run file as it is uploaded, in hex."""
        return hashlib.sha256(self.run_file).hexdigest()

    def sizes(self) -> dict[str, int]:
        """Bytes of every file by its place, in order."""
        found = {name: path.stat().st_size for name, path in self.sources.items()}
        return dict(sorted({**found, RUN_FILE: len(self.run_file)}.items()))

    def write(self, folder: Path) -> None:
        """Lay the package out in an empty folder."""
        for name, path in self.sources.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
        (folder / RUN_FILE).write_bytes(self.run_file)


def build(config: RunConfig, modules: Sequence[str] = ()) -> Package:
    """The package of a run: the module of `model.factory`, and those that are named besides.

    No module is imported. ConfigError for a run file that holds secrets or that would be stored in
    the job's own directory, and for a module that is not here.
    """
    sources: dict[str, Path] = {}
    installed: list[str] = []
    named = [_top(name.replace(".", "/")) for name in modules]
    factory = _top(config.model.factory.partition(":")[0].replace(".", "/"))
    for top in dict.fromkeys([factory, *named]):
        found = module_files(top) if top in named or not is_installed(top) else None
        if found is None:
            installed.append(top)
        else:
            sources |= found
    if (size := sum(path.stat().st_size for path in sources.values())) > MOST_BYTES:
        raise ConfigError(
            f"the modules of the run hold {size} bytes of source, more than {MOST_BYTES}",
            "install them on the cluster, or name smaller ones",
        )
    unnamed = sorted({*_imported(sources.values())} - {_top(path) for path in sources})
    beside = [name for name in unnamed if not is_installed(name) and _origins(name)]
    needed = {*installed} | ({"esper_ray"} - {_top(place) for place in sources})
    return Package(run_file(config), sources, tuple(sorted(needed)), tuple(beside))


def run_file(config: RunConfig) -> bytes:
    """The run file that the job reads: what was set, checked, on the cluster that it runs on."""
    values = config.model_dump(mode="json", exclude_unset=True)
    if found := next(secret_names(values), None):
        raise ConfigError(
            f"{found} looks like a secret, and all who use the cluster can read a job's files",
            "give it to the nodes: by environment, as AWS_SECRET_ACCESS_KEY, or by a role",
        )
    _check_shared(config)
    values["cluster"] = {**values.get("cluster", {}), "address": "auto"}
    return yaml.safe_dump(values, sort_keys=True).encode()


def _check_shared(config: RunConfig) -> None:
    """What a job stores must outlive its directory."""
    for url in (config.storage_url, *config.storage.replicas):
        scheme, sign, _ = url.partition("://")
        if scheme == "memory" or not (sign or os.path.isabs(url)):
            raise ConfigError(
                f"storage.url {url!r} would end with the job",
                "give a bucket, or the absolute path of a folder that all nodes share",
            )


def wanted(name: str) -> bool:
    """Whether a file of a named module is uploaded: Python source, and nothing hidden."""
    path = PurePosixPath(name)
    return path.suffix == ".py" and not any(part.startswith(".") for part in path.parts)


def module_files(top: str) -> dict[str, Path]:
    """Source files of a module or package by their place; ConfigError where there are none.

    Links are left out, or a folder that one names would travel twice.
    """
    origins = _origins(top)
    if not origins:
        raise ConfigError(
            f"the module {top!r} is not found here", "submit from the folder that holds it"
        )
    found: dict[str, Path] = {}
    for origin in origins:
        if origin.is_symlink():
            raise ConfigError(f"{origin} is a link, which is not uploaded", "name what it links to")
        files = _below(origin) if origin.is_dir() else [origin]
        found |= {path.relative_to(origin.parent).as_posix(): path for path in files}
    return {name: path for name, path in sorted(found.items()) if wanted(name)}


def is_installed(top: str) -> bool:
    """Whether a module is part of Python or of an installed distribution, and so no source here."""
    if top in sys.stdlib_module_names or top == "esper_ray":
        return True
    homes = [Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")]
    origins = _origins(top)
    return bool(origins) and all(
        any(home in origin.resolve().parents for home in homes) for origin in origins
    )


def _origins(top: str) -> list[Path]:
    """The file or folders of a top-level module, without importing it."""
    spec = importlib.util.find_spec(top) if top.isidentifier() else None
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return [Path(folder) for folder in spec.submodule_search_locations]
    return [Path(spec.origin)] if spec.has_location and spec.origin else []


def _below(folder: Path) -> Iterator[Path]:
    for here, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not (path := Path(here) / name).is_symlink():
                yield path


def _imported(paths: Iterable[Path]) -> Iterator[str]:
    """Top-level modules that source files import by name."""
    for path in paths:
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError) as error:
            raise ConfigError(f"{path} is not Python: {error}") from error
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from (_top(alias.name.replace(".", "/")) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.partition(".")[0]


def _top(place: str) -> str:
    """The module that a file at this place of the package belongs to."""
    return place.partition("/")[0].removesuffix(".py")


def environment(folder: Path, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The runtime environment of a job whose package was laid out in `folder`.

    ConfigError for an `extra` that names files of its own.
    """
    if named := {"working_dir", "py_modules"} & {*extra}:
        raise ConfigError(
            f"the runtime environment sets {min(named)}, which `submit` makes itself",
            "leave it out; --module names what else is uploaded",
        )
    variables = {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", **extra.get("env_vars", {})}
    kept = {name: value for name, value in extra.items() if name != "excludes"}
    return {**kept, "env_vars": variables, "working_dir": str(folder)}
