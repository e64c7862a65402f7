"""What people ask of a run between its epochs: what becomes of the seeds, and the answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest

from esper_ray.config import RunConfig
from esper_ray.errors import ConfigError
from esper_ray.events.log import EventKind
from esper_ray.events.messages import Answer, EpochReport
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.lifecycle import Refusal
from esper_ray.runtime import Runtime
from tests.runs.history import assert_log_replays, changes, events_of, grow, stored_states

ConfigMaker = Callable[..., RunConfig]
LAYER = "reader.hidden"
NEVER = {"lifecycle__germinate_after": 1_000}
"""The policy itself plants nothing."""

Script = Mapping[int, Sequence[tuple[str, str, Sequence[int]]]]


class Asking:
    """Makes requests after given epochs; keeps the answers by the epoch that gave them."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self.answers: dict[int, tuple[Answer, ...]] = {}

    def __call__(self, runtime: Runtime, report: EpochReport) -> None:
        if report.answers:
            self.answers[report.epoch] = report.answers
        for action, layer, seeds in self._script.get(report.epoch, ()):
            runtime.request(action, layer, seeds)

    def refusals(self, epoch: int) -> dict[tuple[str, int], Refusal]:
        return {(a.action, a.seed_id): a.refusal for a in self.answers[epoch]}


SCRIPT: Script = {
    0: [("germinate", LAYER, [0, 1, 2, 3])],
    2: [("cancel", LAYER, [1]), ("cull", LAYER, [2])],  # in their first epoch of TRAINING
    4: [("cull", LAYER, [2])],
    5: [("rollback", LAYER, [3])],
    6: [("replant", LAYER, [0, 1, 2, 3]), ("germinate", "nowhere", [0])],
    8: [("germinate", LAYER, [1, 2, 3, 4])],
}


def test_requests_lead_seeds_through_their_lives_and_each_is_answered(
    make_config: ConfigMaker,
) -> None:
    asking = Asking(SCRIPT)
    config = make_config(**NEVER, lifecycle__replanting=True, train__epochs=24)
    log, plan, reports = grow(config, listen=asking)
    assert list(asking.answers) == [epoch + 1 for epoch in SCRIPT]
    done = Refusal.NONE
    assert asking.refusals(1) == {("germinate", seed): done for seed in range(4)}
    assert asking.refusals(3) == {("cancel", 1): done, ("cull", 2): Refusal.TOO_EARLY}
    assert asking.refusals(5) == {("cull", 2): done}
    assert asking.refusals(6) == {("rollback", 3): done}
    assert asking.refusals(7) == {
        ("replant", 0): Refusal.NOT_IN_TABLE,  # it is in GRAFTING
        ("replant", 1): done,
        ("replant", 2): done,
        ("replant", 3): done,
        ("germinate", 0): Refusal.UNKNOWN_SEED,
    }
    assert asking.refusals(9) == {
        **{("germinate", seed): done for seed in (1, 2, 3)},
        ("germinate", 4): Refusal.UNKNOWN_SEED,
    }
    grown = [("POLICY", "TRAINING"), ("POLICY", "GRAFTING"), ("POLICY", "STABILIZATION")]
    begun = [("USER", "GERMINATED"), *grown[:1]]
    anew = [("REPLANT", "DORMANT"), ("USER", "GERMINATED"), *grown]
    assert changes(log, LAYER, 0)[:4] == [("USER", "GERMINATED"), *grown]
    assert changes(log, LAYER, 1)[:8] == [*begun, ("USER", "CANCELLED"), *anew]
    assert changes(log, LAYER, 2)[:8] == [*begun, ("USER", "CULLED"), *anew]
    assert changes(log, LAYER, 3)[:9] == [*begun, grown[1], ("USER", "ROLLED_BACK"), *anew]
    assert set(stored_states(log, "predictor.hidden")) == {S.DORMANT}
    assert reports[9].seeds[LAYER]["GERMINATED"] == 3
    assert_log_replays(log, plan)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, Refusal.REPLANTING_OFF),
        ({"lifecycle__replanting": True, "lifecycle__embargo_epochs": 4}, Refusal.EMBARGO),
    ],
)
def test_culled_seed_starts_anew_only_where_and_when_it_may(
    make_config: ConfigMaker, given: dict[str, object], told: Refusal
) -> None:
    again = ("replant", LAYER, [0])
    asking = Asking(
        {0: [("germinate", LAYER, [0])], 4: [("cull", LAYER, [0])], 7: [again], 8: [again]}
    )
    log, plan, _ = grow(make_config(**NEVER, **given, train__epochs=12), listen=asking)
    assert asking.refusals(8) == {("replant", 0): told}  # culled in epoch 5, three epochs ago
    later = Refusal.NONE if told is Refusal.EMBARGO else told
    assert asking.refusals(9) == {("replant", 0): later}
    assert len(events_of(log, EventKind.REPLANT)) == (later is Refusal.NONE)
    assert stored_states(log, LAYER)[0] is (S.DORMANT if later is Refusal.NONE else S.CULLED)
    assert_log_replays(log, plan)


def test_unknown_action_is_refused_where_it_is_asked_for(make_config: ConfigMaker) -> None:
    def ask(runtime: Runtime, report: EpochReport) -> None:
        with pytest.raises(ConfigError, match="no action is named 'water'"):
            runtime.request("water", LAYER, [report.epoch])

    _, _, reports = grow(make_config(train__epochs=2), listen=ask)
    assert [report.answers for report in reports] == [(), ()]


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_requests_reach_a_run_on_actors(make_config: ConfigMaker, ray_cluster: str) -> None:
    script: Script = {0: [("germinate", LAYER, [0, 7])], 2: [("cancel", LAYER, [0])]}
    found = []
    for local in (True, False):
        name, asking = f"local-{local}".lower(), Asking(script)
        config = make_config(name, **NEVER, train__epochs=5, cluster__address=ray_cluster)
        log, plan, _ = grow(config, local=local, listen=asking)
        assert_log_replays(log, plan)
        found.append(asking.answers)
        assert stored_states(log, LAYER)[0] is S.CANCELLED
    assert found[0] == found[1]
    assert [len(answers) for answers in found[0].values()] == [2, 1]


@pytest.mark.parametrize("local", [True, pytest.param(False, marks=pytest.mark.ray)])
def test_an_action_that_does_not_exist_harms_no_run(
    make_config: ConfigMaker, ray_cluster: str, local: bool
) -> None:
    config = make_config(cluster__address=ray_cluster, train__epochs=2)
    with Runtime(config, local=local) as runtime:

        def ask(report: EpochReport) -> None:
            with pytest.raises(ConfigError, match="no action is named 'explode'"):
                runtime.request("explode", "reader.hidden", [report.epoch])

        assert runtime.fit("never", on_epoch=ask).status == "completed"
