"""`esper-ray checkpoints`: look at what a run has stored, keep it whole and keep it small."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from esper_ray.terminal import guarded, json_option, print_json, stored

if TYPE_CHECKING:
    from esper_ray.storage import RunCheckpoints


@click.group()
def checkpoints() -> None:
    """Look at what a run has stored, keep it whole and keep it small."""


def _found(url: str) -> tuple[RunCheckpoints, str, bool]:
    """The checkpoints of the run at URL, the selector, and whether the user gave one."""
    from esper_ray.storage import RunCheckpoints, RunLog, split_url

    prefix, selector = split_url(url)
    return RunCheckpoints(RunLog(stored(prefix))), selector, prefix != url


@checkpoints.command("list")
@click.argument("url")
@json_option
@guarded
def list_(url: str, as_json: bool) -> None:
    """List the checkpoints of the run at URL, newest first."""
    from esper_ray.console import checkpoint_table

    rows = _found(url)[0].rows()
    if as_json:
        print_json({"url": url, "checkpoints": rows})
    else:
        click.echo(checkpoint_table(rows))


@checkpoints.command()
@click.argument("url")
@json_option
@guarded
def show(url: str, as_json: bool) -> None:
    """Show one checkpoint: URL@latest, URL@step=N, URL@PIN."""
    from esper_ray.console import checkpoint_text

    found, selector, _ = _found(url)
    body = found.load(found.resolve(selector))
    if as_json:
        print_json(body)
    else:
        click.echo(checkpoint_text(body))


@checkpoints.command()
@click.argument("url")
@click.option("--quick", is_flag=True, help="Look at presence and sizes, hash manifests only.")
@click.option("--replica", "replicas", multiple=True, metavar="URL", help="Compare with it.")
@json_option
@guarded
def verify(url: str, quick: bool, replicas: tuple[str, ...], as_json: bool) -> None:
    """Hash all that is stored at URL, or all that URL@step=N needs; exit 4 on any damage."""
    from esper_ray.errors import CorruptError
    from esper_ray.storage import compare

    found, selector, explicit = _found(url)
    problems = found.verify(found.resolve(selector) if explicit else None, quick=quick)
    for replica in replicas:
        problems += compare(found.log, stored(replica), quick=quick)
    if as_json:
        print_json({"url": url, "problems": problems})
    for problem in problems if not as_json else []:
        click.echo(f"{problem['severity']}: {problem['object']}: {problem['problem']}")
    damaged = [p for p in problems if p["severity"] == "damage"]
    if damaged:
        raise CorruptError(
            f"{len(damaged)} damaged objects at {url}", "restore an undamaged one by URL@step=N"
        )
    if not as_json:
        said = "has the size that" if quick else "is what"
        click.echo(f"ok: every object at {url} {said} was committed")


@checkpoints.command()
@click.argument("url")
@click.argument("name")
@json_option
@guarded
def pin(url: str, name: str, as_json: bool) -> None:
    """Give the checkpoint URL[@step=N] a NAME: URL@NAME finds it, and no prune takes it."""
    from esper_ray.storage import pins

    pins.check_name(name)
    found, selector, _ = _found(url)
    made = pins.pin(found.log.root, name, found.resolve(selector))
    if as_json:
        print_json({"url": url, "name": made.name, "seq": made.seq, "step": made.step})
    else:
        click.echo(f"{name}: step {made.step}")


@checkpoints.command()
@click.argument("url")
@click.argument("name")
@json_option
@guarded
def unpin(url: str, name: str, as_json: bool) -> None:
    """Take the NAME of a checkpoint away; the checkpoint stays until a prune takes it."""
    from esper_ray.storage import pins

    pins.unpin(stored(url), name)
    if as_json:
        print_json({"url": url, "name": name})
    else:
        click.echo(f"{name} is no pin any more")


@checkpoints.command()
@click.argument("url")
@click.option("--keep-last", type=click.IntRange(1), default=20, show_default=True)
@click.option(
    "--keep-every", type=click.IntRange(0), default=0, help="Also keep each K-th; 0 is none."
)
@click.option("--grace", type=click.FloatRange(0), default=24.0, show_default=True, help="Hours.")
@click.option("--alone", is_flag=True, help="No run writes there: a grace below 2 hours is safe.")
@click.option("--dry-run", is_flag=True, help="Say what would happen, and change nothing.")
@json_option
@guarded
def prune(
    url: str,
    keep_last: int,
    keep_every: int,
    grace: float,
    alone: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Mark what is not kept, and delete what was marked longer than the grace ago.

    Kept are the newest commits, each K-th, all pins, and all that these reach.
    """
    import dataclasses

    from esper_ray.storage import Retention, prune

    policy = Retention(keep_last, keep_every)
    report = prune(stored(url), policy, grace * 3600, alone=alone, dry_run=dry_run)
    if as_json:
        print_json({"url": url, "dry_run": dry_run, **dataclasses.asdict(report)})
        return
    click.echo(f"{len(report.kept)} checkpoints are kept")
    for path in report.deleted:
        click.echo(f"{'would delete' if dry_run else 'deleted'}: {path}")
    click.echo(f"{len(report.deleted)} objects, {report.bytes_deleted} bytes deleted")
    later = len(report.marked) + len(report.waiting)
    click.echo(f"{later} objects are marked for a prune {grace:g} h after they were")


@checkpoints.command()
@click.argument("url")
@click.argument("target", metavar="URL2")
@json_option
@guarded
def copy(url: str, target: str, as_json: bool) -> None:
    """Copy the run at URL, or what URL@step=N or URL@PIN needs, to URL2; all is read back there."""
    import dataclasses

    from esper_ray.storage import Root, copy_commit, copy_run

    found, selector, explicit = _found(url)
    source, place = found.log.root, Root.open(target)
    if explicit:
        report = copy_commit(source, place, found.resolve(selector))
    else:
        report = copy_run(source, place)
    if as_json:
        print_json({"url": url, "target": target, **dataclasses.asdict(report)})
    else:
        written = f"{len(report.written)} objects, {report.bytes_written} bytes, were copied"
        click.echo(f"{written}; {report.present} were there")


@checkpoints.command()
@click.argument("url")
@click.option("--from", "replicas", multiple=True, required=True, metavar="URL2", help="Replica.")
@click.option("--grace", type=click.FloatRange(0), default=24.0, show_default=True, help="Hours.")
@json_option
@guarded
def repair(url: str, replicas: tuple[str, ...], grace: float, as_json: bool) -> None:
    """Write damaged objects at URL anew from a replica, and remove temporary files past the grace.

    Exit 4 if damage is left.
    """
    import dataclasses

    from esper_ray.errors import CorruptError
    from esper_ray.storage import repair

    report = repair(stored(url), [stored(replica) for replica in replicas], grace * 3600)
    left = [problem for problem in report.left if problem["severity"] == "damage"]
    if as_json:
        print_json({"url": url, **dataclasses.asdict(report)})
    else:
        for path, replica in report.healed.items():
            click.echo(f"healed: {path} from {replica}")
        for path in report.removed:
            click.echo(f"removed: {path}")
        for problem in left:
            click.echo(f"damage: {problem['object']}: {problem['problem']}")
    if left:
        raise CorruptError(
            f"{len(left)} damaged objects are left at {url}", "name another replica by --from"
        )
    if not as_json:
        click.echo(f"ok: {len(report.healed)} objects were healed, no damage is left")
