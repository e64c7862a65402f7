"""The `esper-ray` command: words in, words and exit codes out."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import sys
from typing import TYPE_CHECKING

import click

from esper_ray.checkpoint_commands import checkpoints
from esper_ray.event_commands import events
from esper_ray.job_commands import COMMANDS as JOB_COMMANDS
from esper_ray.legacy.command import import_
from esper_ray.run_commands import COMMANDS
from esper_ray.terminal import (
    TERMINATED,
    guarded,
    is_run_file,
    json_option,
    note,
    print_json,
    stored,
)

if TYPE_CHECKING:
    from esper_ray.config import RunConfig

    StoredRun = tuple[RunConfig, str]

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


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="esper-ray", prog_name="esper-ray")
def main() -> None:
    """Grow a PyTorch model while it trains, on Ray actors."""


checkpoints.add_command(import_)
for command in (checkpoints, events, *COMMANDS, *JOB_COMMANDS):
    main.add_command(command)


def _stored_run(source: str, overrides: tuple[str, ...], allowed: tuple[str, ...]) -> StoredRun:
    """The run file of a run known by its URL, and the checkpoint to go on from."""
    from esper_ray.actors.run_point import RunPoint
    from esper_ray.config.stored import stored_config
    from esper_ray.storage import RunCheckpoints, RunLog, split_url

    url, selector = split_url(source)
    root = stored(url)
    kept = RunCheckpoints(RunLog(root))
    settings = RunPoint.from_json(kept.load(kept.resolve(selector))).config
    config = stored_config(settings, root.url, overrides, allowed)
    if allowed:
        sys.path.insert(0, os.getcwd())
    return config, f"{root.url}@{selector}"


@main.command()
@click.argument("source", metavar="CONFIG|CHECKPOINT")
@click.option("--local", is_flag=True, help="Run in this process, without Ray.")
@click.option(
    "--resume",
    default="auto",
    show_default=True,
    metavar="auto|never|URL",
    help="Checkpoint to start from: the newest valid one, none, or URL[@latest|@step=N|@PIN].",
)
@click.option(
    "--allow-factory",
    "allowed",
    multiple=True,
    metavar="MODULE:FUNCTION",
    help="With CHECKPOINT: a model of your own that it may name.",
)
@set_option
@json_option
@guarded
def train(
    source: str,
    local: bool,
    resume: str,
    allowed: tuple[str, ...],
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train and grow the model that CONFIG describes, or go on from CHECKPOINT (URL@step=N)."""
    if is_run_file(source):
        config = _load(source, overrides)
    else:
        config, found = _stored_run(source, overrides, allowed)
        resume = found if resume == "auto" else resume
    from esper_ray.console import Progress, summary
    from esper_ray.runtime import Runtime

    with (
        Runtime(config, local=local, warn=note) as runtime,
        Progress(config.train.epochs, runtime.plan.card) as progress,
    ):
        result = runtime.fit(resume, on_epoch=progress.show)
    if as_json:
        print_json(dataclasses.asdict(result))
    else:
        command = [_program(), "train", source, *(["--local"] if local else [])]
        command += [word for name in allowed for word in ("--allow-factory", name)]
        command += [word for text in overrides for word in ("--set", text)]
        click.echo(summary(config, shlex.join(command), result))
    if result.status == "terminated":
        sys.exit(TERMINATED)


@main.command()
@config_argument
@set_option
@json_option
@guarded
def plan(config_path: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show which layers CONFIG matches and where they would run; start nothing."""
    config = _load(config_path, overrides)
    from esper_ray.console import plan_document, plan_table
    from esper_ray.planning import plan_run
    from esper_ray.storage import Root

    Root.open(config.storage_url, **config.storage.access)  # connects to nothing
    document = plan_document(config, plan_run(config))
    if as_json:
        print_json(document)
    else:
        click.echo(plan_table(document))


@main.command()
@click.argument("run")
@click.option("--layer", required=True, help="The layer's name, as `plan` shows it.")
@click.option("--seed", "seed_id", required=True, type=int, help="Which of its seeds.")
@json_option
@guarded
def explain(run: str, layer: str, seed_id: int, as_json: bool) -> None:
    """Say why a seed is where it is; RUN is a name or a URL, up to @step=N or @PIN if given."""
    from esper_ray import explain as explained
    from esper_ray.storage import RunCheckpoints, RunLog, split_url

    url, selector = split_url(run)
    log = RunLog(stored(url))
    upto = None if url == run else RunCheckpoints(log).resolve(selector)
    document = explained.explain(log, layer, seed_id, upto)
    if as_json:
        print_json(document)
    else:
        click.echo(explained.explain_text(document))


@main.command()
@click.argument("source", metavar="CONFIG|CHECKPOINT")
@click.option("--out", required=True, metavar="FILE", help="What to write: .png or .html.")
@click.option("--layer", help="Draw this layer only.")
@json_option
@guarded
def chunks(source: str, out: str, layer: str | None, as_json: bool) -> None:
    """Draw the chunks that CONFIG plans, or the seeds that CHECKPOINT (RUN[@step=N|@PIN]) holds."""
    from esper_ray import picture
    from esper_ray.storage import RunLog, split_url

    render = picture.renderer(out)
    if is_run_file(source):
        drawn = picture.of_plan(_load(source, ()))
    else:
        url, selector = split_url(source)
        drawn = picture.of_checkpoint(RunLog(stored(url)), selector)
    drawn = drawn.only(layer)
    picture.write(out, render(drawn))
    if as_json:
        print_json(drawn.to_json(out))
    else:
        click.echo(out)


@main.command()
@click.argument("name")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="For `layer`: where it runs.")
@click.option("--url", help="For `checkpoint`: the object store; default, an S3 server of its own.")
@click.option("--quick", is_flag=True, help="For `layer` and `checkpoint`: less, for a look.")
@click.option("--strict", is_flag=True, help="Exit 1 where a row misses its target.")
@json_option
@guarded
def bench(name: str, strict: bool, as_json: bool, **options: str | bool | None) -> None:
    """Measure a speed claim: NAME is `checkpoint`, `layer`, `pipeline`, `state` or `step`."""
    from esper_ray.bench import run_bench, table

    document = run_bench(name, **{n: value for n, value in options.items() if value})
    if as_json:
        print_json(document)
    else:
        click.echo(table(document))
    if strict and not all(row["met"] for row in document["rows"]):
        sys.exit(1)
