"""The same in a table: a row per seed, or per run of equal seeds where there are many."""

from __future__ import annotations

from collections.abc import Sequence

from esper_ray.picture.rows import Chunk, same_runs
from esper_ray.seeds.logical_seed import METRICS

_WORDS = ("state", "health")


def table(chunks: Sequence[Chunk], most: int) -> str:
    """A foldable table of at most `most` rows."""
    if len(chunks) <= most:
        return _folded(f"Table of {len(chunks)} seeds", [_row(chunk) for chunk in chunks])
    runs = list(same_runs(chunks))
    title = f"Table of {len(chunks)} seeds as {len(runs)} runs of equal seeds"
    title += f", the first {most}" if len(runs) > most else ""
    return _folded(title, [_run(run) for run in runs[:most]])


def _row(chunk: Chunk) -> dict[str, str]:
    measured = {
        name: f"{chunk.metrics[name]:.4g}" if name in chunk.metrics else "-" for name in METRICS
    }
    score = "-" if chunk.score is None else f"{chunk.score:.3g}"
    return {**_run([chunk]), "errors": str(chunk.errors), "score": score, **measured}


def _run(run: Sequence[Chunk]) -> dict[str, str]:
    first, last = run[0], run[-1]
    several = len(run) > 1
    return {
        "seed": f"{first.seed_id} to {last.seed_id}" if several else str(first.seed_id),
        "from": str(first.start),
        "to": str(last.stop),
        "state": first.state.name,
        "alpha": f"{first.alpha:.3g}",
        "health": first.health.name,
    }


def _folded(title: str, rows: Sequence[dict[str, str]]) -> str:
    names = list(rows[0]) if rows else []
    head = "".join(f"<th{_side(name)}>{name}</th>" for name in names)
    body = "\n".join(
        f"<tr>{''.join(f'<td{_side(name)}>{text}</td>' for name, text in row.items())}</tr>"
        for row in rows
    )
    return (
        f'<details><summary>{title}</summary><div class="scroll"><table><thead><tr>{head}</tr>'
        f"</thead><tbody>\n{body}\n</tbody></table></div></details>"
    )


def _side(name: str) -> str:
    return ' class="l"' if name in _WORDS else ""
