"""`esper-ray checkpoints import`: what came before, in the words of a command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from esper_ray.terminal import guarded, json_option, print_json

if TYPE_CHECKING:
    from esper_ray.legacy.importing import Imported
    from esper_ray.legacy.records import Codes


@click.command("import")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("url")
@click.option("--allow-legacy-pt", is_flag=True, help="Read .pt files, which are pickles.")
@click.option(
    "--v1-codes",
    type=click.Choice(["phase1", "identity"]),
    default="phase1",
    show_default=True,
    help="What the state of a version 1 record means: a Phase 1 state, or one of today's eleven.",
)
@json_option
@guarded
def import_(folder: Path, url: str, allow_legacy_pt: bool, v1_codes: str, as_json: bool) -> None:
    """Import Phase 1 tables and .pt records in DIR as one checkpoint at the new URL."""
    from esper_ray.legacy.importing import import_folder
    from esper_ray.legacy.loading import PtLoader
    from esper_ray.storage import Root

    root, codes = Root.open(url), cast("Codes", v1_codes)
    if allow_legacy_pt:
        with PtLoader() as loader:
            done = import_folder(folder, root, loader=loader, codes=codes)
    else:
        done = import_folder(folder, root, codes=codes)
    if as_json:
        files = [report.to_json() for report in done.files]
        print_json({"checkpoint": done.url, "layers": done.layers, "files": files})
    else:
        click.echo(_text(done))


def _text(done: Imported) -> str:
    lines = []
    for report in done.files:
        seed = "" if report.seed is None else f" seed {report.seed}"
        of = "" if report.layer is None else f" as {report.layer}{seed}, version {report.version}"
        lines.append(f"{report.outcome}: {report.file}{of}")
        lines += [f"  {note}" for note in report.notes]
    for layer, counts in done.layers.items():
        lines.append(f"{layer}: " + ", ".join(f"{n} {state}" for state, n in counts.items()))
    return "\n".join([*lines, done.url])
