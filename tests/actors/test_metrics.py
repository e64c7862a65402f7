"""Metrics: what a report becomes, that the dashboard knows them, and that a cluster shows them."""

from __future__ import annotations

import contextlib
import json
import re
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from esper_ray.actors.metrics import METRICS, MetricsHub, NoRim, rim_here
from esper_ray.events.messages import EpochReport
from esper_ray.lifecycle import ExtendedLifecycle

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana.json"
_SUFFIXES = {"histogram": ("_sum", "_count", "_bucket"), "gauge": ("",), "counter": ("",)}


@dataclass
class Rim:
    """Keeps what was written last."""

    values: dict[tuple[str, ...], float] = field(default_factory=dict)

    def write(self, name: str, value: float, tags: Mapping[str, str]) -> None:
        assert tags["run"] == "digits"
        key = (name, *(tags[tag] for tag in METRICS[name].tags))
        held = self.values.get(key, 0.0) if METRICS[name].kind == "counter" else 0.0
        self.values[key] = held + value


def report(**given: Any) -> EpochReport:
    values: dict[str, Any] = {
        "epoch": 0,
        "step": 8,
        "losses": (1.0,) * 8,
        "gate_loss": 2.5,
        "gate_accuracy": 0.5,
        "seeds": {"a": {"DORMANT": 3, "TRAINING": 1}},
        "moves": (("a", 0, "GERMINATED", "TRAINING"), ("a", 1, "GERMINATED", "TRAINING")),
        "transitions": 2,
        "states_visited": (),
        "commit": None,
    }
    return EpochReport(**{**values, **given})


def test_report_becomes_values_with_few_tags() -> None:
    rim = Rim()
    hub = MetricsHub(rim, "digits")
    hub.started(3)
    hub.steps(4.0, 8)
    hub.epoch(report(), backlog=2)
    hub.epoch(report(seeds={"a": {"TRAINING": 4}}), backlog=0)
    assert rim.values["esper_seeds", "a", "TRAINING"] == 4
    assert rim.values["esper_seeds", "a", "DORMANT"] == 0  # a state that was left is no seed's
    assert rim.values["esper_transitions_total", "a", "GERMINATED", "TRAINING"] == 4
    assert rim.values["esper_step_seconds",] == 0.5
    assert (rim.values["esper_run_epoch",], rim.values["esper_gate_loss",]) == (3, 2.5)
    assert len(rim.values) == len(ExtendedLifecycle) + 6
    assert rim.values["esper_outbox",] == 0


def test_uncommitted_steps_count_from_the_last_commit() -> None:
    rim, seen = Rim(), []
    hub = MetricsHub(rim, "digits")
    hub.started(1)
    for step, commit in ((8, None), (16, 1), (24, None), (32, None), (40, 2)):
        hub.epoch(report(step=step, commit=commit), 0)
        seen.append(rim.values["esper_uncommitted_steps",])
    assert seen == [8, 0, 8, 16, 0]


def test_no_metric_has_a_tag_of_high_cardinality() -> None:
    tags = {tag for metric in METRICS.values() for tag in metric.tags}
    assert tags <= {"layer", "shard", "state", "from", "to", "op"}


def test_without_a_cluster_values_go_nowhere() -> None:
    assert isinstance(rim_here(), NoRim)
    MetricsHub(NoRim(), "digits").epoch(report(), 0)


# ------------------------------------------------------------------ the dashboard


def expressions() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def shown() -> dict[str, str]:
    """Name in Prometheus -> name in the table."""
    return {
        f"ray_{name}{suffix}": name
        for name, metric in METRICS.items()
        for suffix in _SUFFIXES[metric.kind]
    }


@pytest.mark.parametrize("expression", expressions())
def test_every_panel_names_metrics_and_tags_that_exist(expression: str) -> None:
    names = re.findall(r"\bray_\w+", expression)
    assert names
    assert set(names) <= shown().keys()
    tags = {"run", *(t for name in names for t in METRICS[shown()[name]].tags)}
    if any(name.endswith("_bucket") for name in names):
        tags.add("le")
    grouped = re.findall(r"\b(?:sum|max) by \(([^)]*)\)", expression)
    # Ray adds a worker's id to each series: whatever is not grouped shows one line for each.
    assert len(grouped) == len(names)
    for group in grouped:
        assert {tag.strip() for tag in group.split(",")} <= tags
    for selected in re.findall(r"\{([^}]*)\}", expression):
        assert {re.split(r"[=!]", part)[0].strip() for part in selected.split(",")} <= tags


def test_dashboard_shows_every_metric() -> None:
    named = {shown()[name] for e in expressions() for name in re.findall(r"\bray_\w+", e)}
    assert named == set(METRICS)


# ------------------------------------------------------------------ a real cluster


@pytest.mark.ray
@pytest.mark.slow
def test_values_appear_at_the_metrics_endpoint_of_a_node(ray_cluster: str) -> None:
    import ray

    class Source:
        """An actor that has a hub, as a coordinator has."""

        def tell(self) -> str:
            rim = rim_here()
            hub = MetricsHub(rim, "digits")
            hub.started(7)
            hub.steps(4.0, 8)
            hub.saved(0.5)
            hub.epoch(report(), backlog=2)
            return type(rim).__name__

    source: Any = ray.remote(Source).options(num_cpus=0).remote()
    assert ray.get(source.tell.remote(), timeout=60) == "RayRim"
    [node] = ray.nodes()  # type: ignore[no-untyped-call]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = ("ray_esper_run_epoch{", "ray_esper_transitions_total{", "ray_esper_step_seconds_sum{")
    deadline, page = time.monotonic() + 60, ""
    while time.monotonic() < deadline and not all(name in page for name in wanted):
        time.sleep(0.5)
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            page = answer.read().decode()
    lines = [line for line in page.splitlines() if line.startswith("ray_esper_")]
    assert {re.split(r"[{]", line)[0] for line in lines} <= shown().keys()
    for name, value in (("ray_esper_run_epoch", 7.0), ("ray_esper_transitions_total", 2.0)):
        [line] = [line for line in lines if line.startswith(f"{name}{{")]
        assert 'run="digits"' in line
        assert float(line.rpartition(" ")[2]) == value


def test_page_lists_every_metric() -> None:
    page = (DASHBOARD.parents[1] / "docs" / "events.md").read_text()
    for name, metric in METRICS.items():
        assert f"| `{name}` | {metric.kind} | {', '.join(metric.tags)} | {metric.about} |" in page
