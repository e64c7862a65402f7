"""The picture as one HTML page: inline SVG, no script, nothing to fetch, a table beside it."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterator, Sequence
from typing import Final

from esper_ray.picture.rows import Layer, Picture, count_states, lines
from esper_ray.picture.strip import WIDTH, Strip
from esper_ray.picture.style import HEALTHS, STATES
from esper_ray.picture.table import table
from esper_ray.picture.words import plain

DETAILED: Final = 12_000
"""Seeds of a picture up to which each has a tooltip and a letter; beyond, a line has one."""

_STYLE: Final = """\
:root{color-scheme:light dark;
--back:#fff;--ink:#1a1a1a;--dim:#595959;--rule:#8c8c8c;--track:#e6e6e6}
@media(prefers-color-scheme:dark){
:root{--back:#161616;--ink:#ececec;--dim:#b0b0b0;--rule:#8c8c8c;--track:#3a3a3a}}
body{margin:1.5rem auto;max-width:1080px;padding:0 1rem;background:var(--back);color:var(--ink);
font:15px/1.45 system-ui,sans-serif}
h1{font-size:1.3rem}h2{font-size:1.05rem;margin:1.6rem 0 .3rem}p{color:var(--dim);margin:.2rem 0}
svg{display:block;width:100%;height:auto}
svg text{font:11px system-ui,sans-serif;fill:var(--dim)}
.key{display:flex;flex-wrap:wrap;gap:.3rem 1rem;padding:0;margin:.6rem 0;list-style:none}
.key svg{display:inline-block;width:1.25rem;height:1.25rem;
vertical-align:-.3rem;margin-right:.35rem}
.cells path{stroke:var(--back);stroke-width:.6}
.cells text{text-anchor:middle;font-weight:600}
.edge{fill:none;stroke:var(--rule);stroke-width:.6}
.track{fill:var(--track)}.alpha{fill:var(--ink)}
.tips rect{fill-opacity:0}.tips rect:hover{stroke:var(--ink);stroke-width:1.2}
.scroll{overflow-x:auto}summary{cursor:pointer;color:var(--dim)}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:.1rem .6rem;text-align:right;border-bottom:1px solid var(--track);white-space:nowrap}
th{color:var(--dim);font-weight:600}.l{text-align:left}
"""


def page(picture: Picture) -> str:
    """The whole document."""
    parts = ["\n".join(_head(picture)), _key()]
    if not picture.layers:
        parts.append("<p>No layer carries seeds.</p>")
    parts += [_layer(layer, picture) for layer in picture.layers]
    return "\n".join([*parts, "</body></html>", ""])


def _head(picture: Picture) -> Iterator[str]:
    title = html.escape(plain(picture.title))
    yield '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width,initial-scale=1">'
    yield (
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none';style-src 'unsafe-inline'\">"
    )
    yield f"<title>Chunks of {title}</title>"
    fills = "".join(f".s{s.value}{{fill:{look.fill}}}" for s, look in STATES.items())
    inks = "".join(f".cells .i{s.value}{{fill:{look.ink}}}" for s, look in STATES.items())
    marks = "".join(f".h{h.value}{{fill:{look.fill}}}" for h, look in HEALTHS.items())
    yield f"<style>\n{_STYLE}{fills}\n{inks}\n{marks}\n</style></head><body>"
    yield f"<h1>Chunks of {title}</h1>"
    yield f"<p>{html.escape(plain(picture.source))}</p>"
    yield (
        "<p>Each box is the chunk of one seed, to scale: its letter and colour are the state, "
        "the bar below is alpha from 0 to 1, the mark above is health, taller where it is worse. "
        "Numbers are feature indices; the end of a range is not part of it.</p>"
    )


def _key() -> str:
    states = "".join(
        f'<li><svg viewBox="0 0 20 20" aria-hidden="true"><g class="cells">'
        f'<path class="s{state.value}" d="M0 0h20v20h-20z"/>'
        f'<text class="i{state.value}" x="10" y="14">{look.letter}</text></g></svg>'
        f"{state.name}</li>"
        for state, look in STATES.items()
    )
    healths = "".join(
        f'<li><svg viewBox="0 0 20 20" aria-hidden="true"><path class="h{health.value}" '
        f'd="M0 {20 - 20 * look.height:g}h20v{20 * look.height:g}h-20z"/></svg>'
        f"{health.name}: {look.words}</li>"
        for health, look in HEALTHS.items()
    )
    return f'<ul class="key">{states}</ul><ul class="key">{healths}</ul>'


def _layer(layer: Layer, picture: Picture) -> str:
    name = html.escape(plain(layer.layer_id))
    counts = ", ".join(f"{count} {state}" for state, count in count_states(layer.chunks).items())
    rows = max(20, 1000 // len(picture.layers))
    return "\n".join(
        [
            f"<h2>{name}</h2>",
            f"<p>{layer.width} features, {len(layer.chunks)} seeds: {counts}</p>",
            *_drawing(layer, name, picture.seeds <= DETAILED),
            table(layer.chunks, rows),
        ]
    )


def _drawing(layer: Layer, name: str, detailed: bool) -> Iterator[str]:
    cut = lines(layer)
    widest = max((line[-1].stop - line[0].start for line in cut), default=1)
    strips = [Strip(line, widest) for line in cut]
    tops = list(itertools.accumulate((s.height for s in strips), initial=0))
    label = f"Chunks of {name}; the table below tells the same"
    yield f'<svg viewBox="0 0 {WIDTH} {tops[-1]}" role="img" aria-label="{label}">'
    for strip, top in zip(strips, tops[:-1], strict=True):
        yield f'<g transform="translate(0 {top})">{"".join(_parts(strip, detailed))}</g>'
    yield "</svg>"


def _parts(strip: Strip, detailed: bool) -> Sequence[str]:
    return [strip.ends(), strip.bars(), strip.cells(letters=detailed), strip.tips(each=detailed)]
