"""`esper-ray events`: what happened in a run, and what happens in it."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING

import click

from esper_ray.terminal import guarded, is_run_file, stored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from esper_ray.actors.event_feed import EventFeed
    from esper_ray.events.event import Event
    from esper_ray.tail import Choice

json_option = click.option("--json", "as_json", is_flag=True, help="One CloudEvent on each line.")


@click.group()
def events() -> None:
    """See what happened in a run, and what happens in it."""


@events.command()
@click.argument("run", metavar="RUN|CONFIG")
@click.option("--follow", is_flag=True, help="Go on with what is committed later, until Ctrl-C.")
@click.option("--layer", help="Show this layer only, and what is about the whole run.")
@click.option(
    "--from",
    "start",
    default="earliest",
    show_default=True,
    metavar="earliest|new|ID",
    help="Begin with the first event, with those to come, or after the one with an id.",
)
@click.option("--superseded", is_flag=True, help="Show what rewinds have undone, too.")
@click.option("--bus", metavar="URL", help="With --follow: hear of it by ray://NAME.")
@click.option("--address", default="auto", show_default=True, help="With --bus: the Ray cluster.")
@click.option("--every", default=1.0, show_default=True, type=click.FloatRange(0.05), help="Look.")
@json_option
@guarded
def tail(
    run: str,
    follow: bool,
    layer: str | None,
    start: str,
    superseded: bool,
    bus: str | None,
    address: str,
    every: float,
    as_json: bool,
) -> None:
    """Print the events of RUN, a name or a URL, or of the run that CONFIG describes."""
    from esper_ray import tail as tailing
    from esper_ray.errors import ConfigError

    if bus and not follow:
        raise ConfigError("--bus has no use without --follow", "add --follow")
    feed, name = _feed(run)
    choice = tailing.Choice(layer, start, superseded)
    seen: set[object] = set()
    show = tailing.as_json if as_json else tailing.as_text

    def past() -> Iterable[Event]:
        return tailing.chosen(tailing.stored_events(feed, choice, seen), choice)  # type: ignore[arg-type]

    if bus:
        _hear(bus, address, name, choice, past, show)
        return
    for event in past():
        click.echo(show(event))
    if follow:
        for event in tailing.follow(feed, choice, seen, every):  # type: ignore[arg-type]
            click.echo(show(event))


def _feed(run: str) -> tuple[EventFeed, str]:
    """The events of a stored run, and its name."""
    from esper_ray.actors.event_feed import EventFeed
    from esper_ray.errors import CheckpointNotFound
    from esper_ray.storage import RunLog

    if is_run_file(run):
        from esper_ray.config import load_config

        config = load_config(run, ())
        root = stored(config.storage_url)
    else:
        root = stored(run)
    log = RunLog(root)
    commits = log.lineage()
    name = str(log.read_commit(commits[0]).get("run")) if commits else "unknown"
    if not commits and not log.epochs():
        raise CheckpointNotFound(f"no event is stored at {root.url}", "check the URL")
    return EventFeed(log, name), name


def _hear(
    url: str,
    address: str,
    run: str,
    choice: Choice,
    past: Callable[[], Iterable[Event]],
    show: Callable[[Event], str],
) -> None:
    """Print what is stored, then what comes by the bus."""
    from esper_ray import tail as tailing
    from esper_ray.actors.event_hub import connected_bus

    async def listen() -> None:
        with connected_bus(url, address) as bus:
            group = f"tail-{secrets.token_hex(4)}"
            async for event in tailing.heard(bus, run, choice, past, group):
                click.echo(show(event))

    asyncio.run(listen())
