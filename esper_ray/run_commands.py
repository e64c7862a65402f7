"""`esper-ray request`, `pause`, `resume` and `stop`: what people want of a run at work."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING

import click

from esper_ray.errors import ConfigError
from esper_ray.terminal import guarded, json_option, note, print_json, stored

if TYPE_CHECKING:
    from esper_ray.events.messages import Answer

_address = click.option(
    "--address",
    default="auto",
    show_default=True,
    metavar="auto|HOST:PORT",
    help="The Ray cluster that the run is on.",
)
_wait = click.option(
    "--wait",
    "wait_s",
    default=0.0,
    show_default=True,
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Wait that long for what comes of it.",
)


def _name(run: str) -> str:
    """The name of a run that is given by name or by URL."""
    if "/" not in run:
        return run
    from esper_ray.actors.run_point import RunPoint
    from esper_ray.storage import RunCheckpoints, RunLog, split_url

    url, _ = split_url(run)
    kept = RunCheckpoints(RunLog(stored(url)))
    return RunPoint.from_json(kept.load(kept.resolve("latest"))).run


@click.command()
@click.argument("run")
@click.argument("action")
@click.option("--layer", required=True, help="The layer's name, as `plan` shows it.")
@click.option(
    "--seed", "seed_ids", required=True, multiple=True, type=int, help="One of its seeds."
)
@_address
@_wait
@json_option
@guarded
def request(
    run: str,
    action: str,
    layer: str,
    seed_ids: tuple[int, ...],
    address: str,
    wait_s: float,
    as_json: bool,
) -> None:
    """Ask for ACTION (germinate, cancel, cull, rollback, replant) of seeds of the RUN at work.

    It is judged at the next epoch boundary; with --wait the verdicts are printed, and one that is
    refused makes the exit code 1.
    """
    from esper_ray.actors.run_control import RunControl
    from esper_ray.lifecycle import move_of

    move_of(action)
    with RunControl(_name(run), address) as control:
        number = control.request(action, layer, seed_ids)
        answers = control.answers(number, wait_s) if wait_s else None
    if as_json:
        told = None if answers is None else [_plain(answer) for answer in answers]
        print_json({"run": run, "request": number, "answers": told})
    elif answers is None:
        click.echo(f"request {number}: judged at the next epoch boundary")
    else:
        click.echo("\n".join(f"{layer} seed {a.seed_id}: {_verdict(a)}" for a in answers))
    if any(answer.refusal for answer in answers or ()):
        sys.exit(1)


def _plain(answer: Answer) -> dict[str, object]:
    return {**dataclasses.asdict(answer), "refusal": answer.refusal.name, "told": _verdict(answer)}


def _verdict(answer: Answer) -> str:
    from esper_ray.lifecycle import REASONS

    return REASONS[answer.refusal]


@click.command()
@click.argument("run")
@_address
@json_option
@guarded
def pause(run: str, address: str, as_json: bool) -> None:
    """Have the RUN stored and held at its next epoch boundary, until `resume` or `stop`."""
    _want(run, address, "pause", as_json, "pauses at its next epoch boundary")


@click.command()
@click.argument("run")
@_address
@json_option
@guarded
def resume(run: str, address: str, as_json: bool) -> None:
    """Have the paused RUN go on."""
    _want(run, address, "resume", as_json, "goes on")


@click.command()
@click.argument("run", metavar="RUN|JOB")
@click.option(
    "--address",
    default="auto",
    show_default=True,
    metavar="auto|HOST:PORT|URL",
    help="The Ray cluster that the run is on; a URL is that of its job server.",
)
@_wait
@click.option("--now", is_flag=True, help="With a URL: send SIGTERM at once.")
@json_option
@guarded
def stop(run: str, address: str, wait_s: float, now: bool, as_json: bool) -> None:
    """Have the RUN stored and ended at its next epoch boundary; `train --resume auto` goes on.

    With the URL of a job server it waits until the job has ended.
    """
    if address.startswith(("http://", "https://")):
        _stop_job(run, address, wait_s, now, as_json)
        return
    if now:
        raise ConfigError(
            "--now signals a job, and --address is no job server", "give http://HOST:8265"
        )
    _want(run, address, "stop", as_json, "stops at its next epoch boundary", wait_s)


def _want(
    run: str, address: str, wish: str, as_json: bool, outcome: str, wait_s: float = 0.0
) -> None:
    from esper_ray.actors.run_control import RunControl
    from esper_ray.actors.stopping import Wish
    from esper_ray.errors import RunFailed

    with RunControl(_name(run), address) as control:
        held = control.wish(Wish(wish))
        ended = control.ended(wait_s) if wait_s else False
    if held is not Wish(wish):
        raise RunFailed(f"run {run!r} is being stopped", "go on with `train --resume auto`")
    if wait_s and not ended:
        raise RunFailed(
            f"run {run!r} has not ended within {wait_s:g} s", "its epoch may last longer: wait on"
        )
    if as_json:
        print_json({"run": run, "wish": wish, "ended": ended})
    else:
        click.echo(f"{run} {'has ended' if ended else outcome}")


def _stop_job(name: str, address: str, wait_s: float, now: bool, as_json: bool) -> None:
    from esper_ray.jobs.server import JobServer
    from esper_ray.jobs.stopping import stop_job

    server = JobServer(address)
    ended = stop_job(server, server.find(name), note, wait_s, now)
    if as_json:
        print_json(dataclasses.asdict(ended))
    else:
        click.echo(f"{ended.job} {ended.status}")


COMMANDS = (request, pause, resume, stop)
