"""What every command shares: where a run is stored, JSON out, and errors as exit codes."""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import click

from esper_ray.errors import CheckpointNotFound, EsperError

if TYPE_CHECKING:
    from esper_ray.storage import Root

R = TypeVar("R")

INTERRUPTED = 130
TERMINATED = 143
_RUN_FILES = (".yaml", ".yml")
_RECORDS = {"FORMAT.json", "commits", "epochs"}


def guarded(command: Callable[..., R]) -> Callable[..., R]:
    """Turn expected failures into two lines and an exit code; --debug shows the traceback."""

    @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    @functools.wraps(command)
    def wrapper(*args: object, debug: bool = False, **kwargs: object) -> R:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            click.echo("error: interrupted", err=True)
            sys.exit(INTERRUPTED)
        except EsperError as error:
            if debug:
                click.echo(traceback.format_exc(), err=True, nl=False)
            click.echo(f"error: {_one_line(error.message)}", err=True)
            if error.hint:
                click.echo(f"hint: {_one_line(error.hint)}", err=True)
            sys.exit(error.exit_code)

    return wrapper


def _one_line(text: str) -> str:
    """Messages that quote a library's own may hold several lines."""
    return " ".join(text.split())


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def note(line: str) -> None:
    """Say something beside the command's result."""
    click.echo(line, err=True)


def print_json(value: object) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: object) -> object:
    """JSON has no NaN: a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_run_file(source: str) -> bool:
    """Whether `source` names a run file, and no stored run: by its ending, or as a file here."""
    return "://" not in source and (source.endswith(_RUN_FILES) or os.path.isfile(source))


def stored(url: str) -> Root:
    """Where a run is stored, by URL or, below ./runs, by name; CheckpointNotFound if nowhere."""
    from esper_ray.storage import Root

    named = os.path.join("runs", url, "checkpoints")
    root = Root.open(named if "/" not in url and os.path.isdir(named) else url)
    names = {*root.names("")}
    if "checkpoints" in names and not _RECORDS & names:  # the folder of a run
        root = Root.open(f"{root.url}/checkpoints")
        names = {*root.names("")}
    if not _RECORDS & names:
        raise CheckpointNotFound(f"no run is stored at {root.url}", "check the URL")
    return root
