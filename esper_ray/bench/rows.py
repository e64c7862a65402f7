"""Rows of a bench, and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Row = dict[str, Any]


def make_row(name: str, value: float, unit: str, target: float | None = None) -> Row:
    """{name, value, unit, target, met}; a row without a target is met."""
    met = target is None or value <= target
    return {"name": name, "value": round(value, 4), "unit": unit, "target": target, "met": met}


def table(document: Mapping[str, Any]) -> str:
    """A bench document as text; intervals, floors and figures against a loop where measured."""
    from esper_ray.console import text_table

    header = ["row", "value", "unit", "target", "met"]
    rows = [
        [
            row["name"],
            row.get("error") or f"{row['value']:,.3f}",
            row["unit"],
            "-" if row["target"] is None else f"<= {row['target']:g}",
            "-" if row["target"] is None else "yes" if row["met"] else "MISSED",
        ]
        for row in document["rows"]
    ]
    if any("low" in row for row in document["rows"]):
        header = [*header, "95 % interval", "floor"]
        for cells, row in zip(rows, document["rows"], strict=True):
            sure = "low" in row
            cells.append(f"{row['low']:.3f} to {row['high']:.3f}" if sure else "-")
            cells.append(f"{row['floor']:.3f}" if row.get("floor") else "-")
    if any("loop_ratio" in row for row in document["rows"]):
        header = [*header, "loop / ours"]
        for cells, row in zip(rows, document["rows"], strict=True):
            ratio = row.get("loop_ratio")
            cells.append("-" if ratio is None else f"{ratio:,.2f}")
    return f"bench {document['bench']} on {document['hardware']}\n{text_table(header, rows)}"
