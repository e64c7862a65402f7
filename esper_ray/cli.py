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
from esper_ray.legacy.command import import_
from esper_ray.terminal import guarded, json_option, note, print_json, stored

if TYPE_CHECKING:
    from esper_ray.config import RunConfig

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
main.add_command(checkpoints)


@main.command()
@config_argument
@click.option("--local", is_flag=True, help="Run in this process, without Ray.")
@click.option(
    "--resume",
    default="auto",
    show_default=True,
    metavar="auto|never|URL",
    help="Checkpoint to start from: the newest valid one, none, or URL[@latest|@step=N|@PIN].",
)
@set_option
@json_option
@guarded
def train(
    config_path: str, local: bool, resume: str, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Train and grow the model that CONFIG describes."""
    config = _load(config_path, overrides)
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
        command = [_program(), "train", config_path, *(["--local"] if local else [])]
        for override in overrides:
            command += ["--set", override]
        click.echo(summary(config, shlex.join(command), result))


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

    Root.open(config.storage_url, config.storage.options)  # connects to nothing
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
    if picture.is_run_file(source):
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
@click.option("--quick", is_flag=True, help="For `layer`: fewer pairs, for a look.")
@click.option("--strict", is_flag=True, help="Exit 1 where a row misses its target.")
@json_option
@guarded
def bench(name: str, device: str | None, quick: bool, strict: bool, as_json: bool) -> None:
    """Measure a speed claim: NAME is `layer`, `state` or `step`."""
    from esper_ray.bench import run_bench, table

    options = {"device": device, "quick": quick}
    document = run_bench(name, **{n: value for n, value in options.items() if value})
    if as_json:
        print_json(document)
    else:
        click.echo(table(document))
    if strict and not all(row["met"] for row in document["rows"]):
        sys.exit(1)
