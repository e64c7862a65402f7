"""The `esper-ray` command: words in, words and exit codes out."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import shlex
import shutil
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from esper_ray.errors import EsperError

if TYPE_CHECKING:
    from esper_ray.config import RunConfig
    from esper_ray.storage import Root

R = TypeVar("R")

INTERRUPTED = 130
_RECORDS = {"FORMAT.json", "commits", "epochs"}


def _guarded(command: Callable[..., R]) -> Callable[..., R]:
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
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a key."
)
config_argument = click.argument("config_path", metavar="CONFIG", type=click.Path())


def _load(config_path: str, overrides: tuple[str, ...]) -> RunConfig:
    from esper_ray.config import load_config

    sys.path.insert(0, os.getcwd())  # model.factory may name a module beside the user
    return load_config(config_path, overrides)


def _program() -> str:
    """This program as the user called it, so that a printed command can be pasted."""
    called = sys.argv[0]
    known = os.path.basename(called) == "esper-ray" and shutil.which("esper-ray") != called
    return called if known else "esper-ray"


def _note(line: str) -> None:
    click.echo(line, err=True)


def _print_json(value: object) -> None:
    click.echo(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: object) -> object:
    """JSON has no NaN: a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="esper-ray", prog_name="esper-ray")
def main() -> None:
    """Grow a PyTorch model while it trains, on Ray actors."""


@main.command()
@config_argument
@click.option("--local", is_flag=True, help="Run in this process, without Ray.")
@click.option(
    "--resume",
    default="auto",
    show_default=True,
    metavar="auto|never|URL",
    help="Checkpoint to start from: the newest valid one, none, or URL[@latest|@step=N].",
)
@set_option
@json_option
@_guarded
def train(
    config_path: str, local: bool, resume: str, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Train and grow the model that CONFIG describes."""
    config = _load(config_path, overrides)
    from esper_ray.console import Progress, summary
    from esper_ray.runtime import Runtime

    with (
        Runtime(config, local=local, warn=_note) as runtime,
        Progress(config.train.epochs, runtime.plan.card) as progress,
    ):
        result = runtime.fit(resume, on_epoch=progress.show)
    if as_json:
        _print_json(dataclasses.asdict(result))
    else:
        command = [_program(), "train", config_path, *(["--local"] if local else [])]
        for override in overrides:
            command += ["--set", override]
        click.echo(summary(config, shlex.join(command), result))


@main.command()
@config_argument
@set_option
@json_option
@_guarded
def plan(config_path: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show which layers CONFIG matches and where they would run; start nothing."""
    config = _load(config_path, overrides)
    from esper_ray.console import plan_document, plan_table
    from esper_ray.planning import plan_run
    from esper_ray.storage import Root

    Root.open(config.storage_url, **config.storage_access)  # connects to nothing
    document = plan_document(config, plan_run(config))
    if as_json:
        _print_json(document)
    else:
        click.echo(plan_table(document))


@main.group()
def checkpoints() -> None:
    """Look at what a run has stored."""


def _manager(url: str) -> tuple[Any, str]:
    from esper_ray.storage import RunCheckpoints, RunLog, split_url

    prefix, selector = split_url(url)
    return RunCheckpoints(RunLog(_stored(prefix))), selector


def _stored(url: str) -> Root:
    """Where a run is stored, by URL or, below ./runs, by name; CheckpointNotFound if nowhere."""
    from esper_ray.errors import CheckpointNotFound
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


@checkpoints.command("list")
@click.argument("url")
@json_option
@_guarded
def list_(url: str, as_json: bool) -> None:
    """List the checkpoints of the run at URL, newest first."""
    from esper_ray.console import checkpoint_table

    rows = _manager(url)[0].rows()
    if as_json:
        _print_json({"url": url, "checkpoints": rows})
    else:
        click.echo(checkpoint_table(rows))


@checkpoints.command()
@click.argument("url")
@json_option
@_guarded
def show(url: str, as_json: bool) -> None:
    """Show one checkpoint: URL@latest, URL@step=N."""
    from esper_ray.console import checkpoint_text

    manager, selector = _manager(url)
    body = manager.load(manager.resolve(selector))
    if as_json:
        _print_json(body)
    else:
        click.echo(checkpoint_text(body))


@checkpoints.command()
@click.argument("url")
@json_option
@_guarded
def verify(url: str, as_json: bool) -> None:
    """Hash everything that is stored at URL; exit 4 on any damage."""
    from esper_ray.errors import CorruptError

    problems = _manager(url)[0].verify()
    if as_json:
        _print_json({"url": url, "problems": problems})
    for problem in problems if not as_json else []:
        click.echo(f"{problem['severity']}: {problem['object']}: {problem['problem']}")
    damaged = [p for p in problems if p["severity"] == "damage"]
    if damaged:
        raise CorruptError(
            f"{len(damaged)} damaged objects at {url}", "restore an undamaged one by URL@step=N"
        )
    if not as_json:
        click.echo(f"ok: every object at {url} is what was committed")


@main.command()
@click.argument("run")
@click.option("--layer", required=True, help="The layer's name, as `plan` shows it.")
@click.option("--seed", "seed_id", required=True, type=int, help="Which of its seeds.")
@json_option
@_guarded
def explain(run: str, layer: str, seed_id: int, as_json: bool) -> None:
    """Say why a seed is where it is; RUN is a name or the URL where it is stored."""
    from esper_ray import explain as explained
    from esper_ray.storage import RunLog

    document = explained.explain(RunLog(_stored(run)), layer, seed_id)
    if as_json:
        _print_json(document)
    else:
        click.echo(explained.explain_text(document))


@main.command()
@click.argument("source", metavar="CONFIG|CHECKPOINT")
@click.option("--out", required=True, metavar="FILE", help="What to write: .png or .html.")
@click.option("--layer", help="Draw this layer only.")
@json_option
@_guarded
def chunks(source: str, out: str, layer: str | None, as_json: bool) -> None:
    """Draw the chunks that CONFIG plans, or the seeds that CHECKPOINT (RUN[@step=N]) holds."""
    from esper_ray import picture
    from esper_ray.storage import RunLog, split_url

    render = picture.renderer(out)
    if picture.is_run_file(source):
        drawn = picture.of_plan(_load(source, ()))
    else:
        url, selector = split_url(source)
        drawn = picture.of_checkpoint(RunLog(_stored(url)), selector)
    drawn = drawn.only(layer)
    picture.write(out, render(drawn))
    if as_json:
        _print_json(drawn.to_json(out))
    else:
        click.echo(out)


@main.command()
@click.argument("name")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="For `layer`: where it runs.")
@click.option("--url", help="For `checkpoint`: the object store; default, an S3 server of its own.")
@click.option("--quick", is_flag=True, help="For `layer` and `checkpoint`: less, for a look.")
@click.option("--strict", is_flag=True, help="Exit 1 where a row misses its target.")
@json_option
@_guarded
def bench(name: str, strict: bool, as_json: bool, **options: str | bool | None) -> None:
    """Measure a speed claim: NAME is `checkpoint`, `layer`, `state` or `step`."""
    from esper_ray.bench import run_bench, table

    document = run_bench(name, **{n: value for n, value in options.items() if value})
    if as_json:
        _print_json(document)
    else:
        click.echo(table(document))
    if strict and not all(row["met"] for row in document["rows"]):
        sys.exit(1)
