"""`esper-ray submit`, `status` and `logs`: a run as a job of a cluster."""

from __future__ import annotations

import dataclasses
import datetime
import secrets
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from esper_ray.terminal import guarded, json_option, note, print_json

if TYPE_CHECKING:
    from esper_ray.jobs.package import Package
    from esper_ray.jobs.server import Job, JobServer

address_option = click.option(
    "--address",
    default="http://127.0.0.1:8265",
    show_default=True,
    metavar="URL",
    help="The job server, which is the dashboard of the cluster's head.",
)


@click.command()
@click.argument("config_path", metavar="CONFIG", type=click.Path())
@address_option
@click.option("--follow", is_flag=True, help="Show its output; exit with the job's own code.")
@click.option("--resume", default="auto", show_default=True, metavar="auto|never|URL")
@click.option(
    "--module",
    "modules",
    multiple=True,
    metavar="NAME",
    help="A module to upload besides that of model.factory; `esper_ray` if the cluster lacks it.",
)
@click.option(
    "--runtime-env", type=click.Path(), metavar="FILE", help="YAML of a Ray runtime environment."
)
@click.option("--python", default="python", show_default=True, help="Python on the cluster.")
@click.option("--dry-run", is_flag=True, help="List what would be uploaded; connect to nothing.")
@click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a key."
)
@json_option
@guarded
def submit(
    config_path: str,
    address: str,
    follow: bool,
    resume: str,
    modules: tuple[str, ...],
    runtime_env: str | None,
    python: str,
    dry_run: bool,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Run CONFIG as a job of a Ray cluster.

    Its files are those that are listed: the run file, and the source of the modules it names.
    """
    from esper_ray.config import load_config
    from esper_ray.jobs import package as packages

    sys.path.insert(0, str(Path.cwd()))  # model.factory may name a module beside the user
    config = load_config(config_path, overrides)
    extra = _environment(runtime_env)
    package = packages.build(config, modules)
    packages.environment(Path(), extra)  # refuses what it must before anything is reached
    _tell(package)
    if dry_run:
        if as_json:
            print_json({"files": package.sizes(), "installed": package.installed})
        return
    from esper_ray.jobs.server import JobServer

    server = JobServer(address)
    job = f"{config.run}-{secrets.token_hex(4)}"
    told = {
        "run": config.run,
        "config_sha256": package.digest,
        "storage_url": config.storage_url,
    }
    entrypoint = [python, "-m", "esper_ray", "train", packages.RUN_FILE, "--resume", resume]
    with tempfile.TemporaryDirectory(prefix="esper-job-") as folder:
        package.write(Path(folder))
        environment = packages.environment(Path(folder), extra)
        server.submit(shlex.join(entrypoint), job, environment, told)
    submitted = server.get(job)
    if not follow:
        _show(submitted, as_json, job)
        return
    if not as_json:
        click.echo(job)
    _end(_followed(server, submitted), as_json)


def _tell(package: Package) -> None:
    sizes = package.sizes()
    note(f"uploading {len(sizes)} files, {sum(sizes.values()):,} bytes:")
    for name, size in sizes.items():
        note(f"  {name}  {size:,}")
    if package.installed:
        note(f"the cluster must have: {', '.join(package.installed)}")
    for name in package.unnamed:
        note(f"not uploaded, though imported: {name} (--module {name} uploads it)")


def _environment(path: str | None) -> dict[str, Any]:
    from esper_ray.config import parse_yaml
    from esper_ray.errors import ConfigError

    if path is None:
        return {}
    try:
        values = parse_yaml(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read the runtime environment {path}: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("env_vars", {}), dict):
        raise ConfigError(f"{path} is no runtime environment", "see cluster/runtime_env.yaml")
    return values


def _followed(server: JobServer, job: Job) -> Job:
    """Its output on stderr until it ends."""
    try:
        return server.follow(job, lambda text: click.echo(text, nl=False, err=True))
    except KeyboardInterrupt:
        note(f"the job goes on: esper-ray logs {job.job} --follow")
        raise


def _end(job: Job, as_json: bool) -> None:
    """Leave with the code of a job that has ended."""
    from esper_ray.errors import RunFailed

    if job.exit_code is None:  # its process never ran, or went with its node
        raise RunFailed(f"job {job.job} failed: {job.message[:500]}", "see its node's logs")
    if as_json:
        print_json(dataclasses.asdict(job))
    if job.exit_code:
        note(f"job {job.job} {job.status}: exit code {job.exit_code}")
    sys.exit(job.exit_code)


def _show(job: Job, as_json: bool, line: str) -> None:
    if as_json:
        print_json(dataclasses.asdict(job))
    else:
        click.echo(line)


@click.command()
@click.argument("job", metavar="[RUN|JOB]", required=False)
@address_option
@json_option
@guarded
def status(job: str | None, address: str, as_json: bool) -> None:
    """Show the job of that id, or the newest of a run, or all."""
    from esper_ray.jobs.server import JobServer

    server = JobServer(address)
    found = server.jobs() if job is None else [server.find(job)]
    if as_json:
        documents = [dataclasses.asdict(one) for one in found]
        print_json(documents if job is None else documents[0])
        return
    for one in found:
        code = "" if one.exit_code is None else f"exit {one.exit_code}"
        began = datetime.datetime.fromtimestamp(one.started).isoformat(" ", "seconds")
        click.echo(f"{one.job}  {one.status}  {code}  {began}  {one.storage_url}".rstrip())


@click.command()
@click.argument("job", metavar="RUN|JOB")
@address_option
@click.option("--follow", is_flag=True, help="Go on until it ends.")
@json_option
@guarded
def logs(job: str, address: str, follow: bool, as_json: bool) -> None:
    """Print what a job has written."""
    from esper_ray.jobs.server import JobServer

    server = JobServer(address)
    found = server.find(job)
    if as_json:
        found = server.follow(found, lambda _: None) if follow else found
        print_json({**dataclasses.asdict(found), "logs": server.logs(found)})
    elif follow:
        server.follow(found, lambda text: click.echo(text, nl=False))
    else:
        click.echo(server.logs(found), nl=False)


COMMANDS = (submit, status, logs)
