"""Runs in which a step goes wrong: what is retired, what is skipped, and what ends the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esper_ray import data
from esper_ray.actors.engines import LocalEngine
from esper_ray.actors.journal import PANIC
from esper_ray.actors.persistence import read_losses, read_state
from esper_ray.config import RunConfig
from esper_ray.errors import RunFailed
from esper_ray.events.gate import parse_gate
from esper_ray.events.log import EventKind
from esper_ray.events.messages import EpochReport
from esper_ray.growth.stage import BATCH, OTHER_BATCH
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.runtime import Runtime
from esper_ray.storage import RunLog, manifest
from tests.runs.history import (
    Listener,
    assert_log_replays,
    changes,
    events_of,
    grow,
    newest,
    segments,
)

ConfigMaker = Callable[..., RunConfig]
LAYER = "reader.hidden"
MODEL = "tests.models_for_tests:choking"


def sum_of(step: int, stream: str = BATCH) -> int:
    """Bytes of the second micro-batch of a step, added up."""
    x, _ = data.load("stdlib_text").train.draw(32, 3, stream, step)
    return int(x.chunk(2)[1].sum())


def choking(sums: Sequence[int]) -> dict[str, Any]:
    args = {"embedding": 8, "hidden": 32, "sums": list(sums)}
    return {"model__factory": MODEL, "model__args": args}


def stored(log: RunLog) -> dict[str, str]:
    """Content of the newest commit's weights, by segment name."""
    parts = segments(newest(log)).items()
    return {name: ref.sha256 for name, ref in parts if "state" not in name and name != "metrics"}


def panics(log: RunLog) -> list[tuple[int, str, str]]:
    """(step, layer, verdict) of every panic that was logged."""
    events = events_of(log, EventKind.FAULT)
    own = np.array([cause == PANIC for cause in events.columns["cause"]], dtype=bool)
    columns = events.take(own).columns
    gates = [parse_gate(text) for text in columns["gate"]]
    verdicts = [gate["verdict"] if gate else "" for gate in gates]
    return list(zip(columns["step"].tolist(), columns["layer"], verdicts, strict=True))


class Spoil:
    """Changes a run in this process after some epoch."""

    def __init__(self, epoch: int, change: Callable[[LocalEngine], None]) -> None:
        self.epoch, self.change = epoch, change
        self.notes: list[str] = []

    def __call__(self, runtime: Runtime, report: EpochReport) -> None:
        self.notes += report.notes
        if report.epoch == self.epoch:
            assert isinstance(runtime._engine, LocalEngine)
            with torch.no_grad():
                self.change(runtime._engine)


def spoil_seeds(*seeds: int, value: float = 1e30) -> Callable[[LocalEngine], None]:
    """Finite weights so large that the host's next layer overflows."""

    def change(engine: LocalEngine) -> None:
        bank = engine._pipeline.stages[0].trainers[LAYER].layer.bank
        bank.weights["w_out"][list(seeds)] = value

    return change


# ------------------------------------------------------------------ the batch is at fault


def test_a_batch_that_makes_no_number_is_skipped_once_and_logged(make_config: ConfigMaker) -> None:
    config = make_config(**choking([sum_of(37)]), train__epochs=20)
    log, plan, reports = grow(config)
    [(step, layer, verdict)] = panics(log)
    assert (step, layer) == (37, "reader.hidden.0")
    assert verdict == (
        "the output of layer 'reader.hidden.0' is not finite, the loss is nan; "
        "no seed is guilty, its batch is skipped"
    )
    assert [r.epoch for r in reports if r.notes] == [37 // 4]
    losses = read_losses(log)
    assert len(losses) == 80
    assert all(map(math.isfinite, losses.values()))
    assert "ROLLED_BACK" not in reports[-1].states_visited
    assert_log_replays(log, plan)


def test_up_to_the_skipped_batch_the_run_is_that_of_a_healthy_one(
    make_config: ConfigMaker,
) -> None:
    sick, *_ = grow(make_config("sick", **choking([sum_of(37)]), train__epochs=12))
    whole, *_ = grow(make_config("whole", **choking([]), train__epochs=12))
    one, two = read_losses(sick), read_losses(whole)
    assert [one[step] for step in range(37)] == [two[step] for step in range(37)]
    assert one[37] != two[37]


def test_several_batches_of_one_epoch_are_skipped_each(make_config: ConfigMaker) -> None:
    config = make_config(**choking([sum_of(0), sum_of(2), sum_of(3), sum_of(13)]), train__epochs=6)
    log, plan, _ = grow(config)
    assert [step for step, *_ in panics(log)] == [0, 2, 3, 13]
    assert_log_replays(log, plan)


def test_two_panics_at_the_same_step_end_the_run_and_name_layer_and_tensor(
    make_config: ConfigMaker,
) -> None:
    config = make_config(**choking([sum_of(37), sum_of(37, OTHER_BATCH)]), train__epochs=20)
    with pytest.raises(RunFailed) as failed:
        grow(config)
    assert failed.value.exit_code == 1
    assert failed.value.message == (
        "step 37 failed twice: the output of layer 'reader.hidden.0' is not finite, the loss is nan"
    )
    assert "URL@step=N" in failed.value.hint


def test_a_run_that_was_resumed_after_a_skipped_batch_ends_as_if_it_had_not_been(
    make_config: ConfigMaker,
) -> None:
    sick = choking([sum_of(37)])
    whole, *_ = grow(make_config("whole", **sick, train__epochs=20))
    grow(make_config("cut", **sick, train__epochs=8))  # before it, so that it panics again
    grow(make_config("cut", **sick, train__epochs=11), "auto")  # and after it
    cut, plan, _ = grow(make_config("cut", **sick, train__epochs=20), "auto")
    assert stored(whole) == stored(cut)
    assert read_losses(whole) == read_losses(cut)
    assert panics(cut) == panics(whole)
    assert newest(whole)["coordinator"]["losses"] == newest(cut)["coordinator"]["losses"]
    assert_log_replays(cut, plan)


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_actors_skip_it_alike(make_config: ConfigMaker, ray_cluster: str) -> None:
    given = {**choking([sum_of(37)]), "cluster__address": ray_cluster, "train__epochs": 14}
    local, *_ = grow(make_config("local", **given))
    log, plan, reports = grow(make_config("actors", **given), local=False)
    assert stored(log) == stored(local)
    assert panics(log) == panics(local)
    assert sum(len(report.notes) for report in reports) == 1
    assert_log_replays(log, plan)


# ------------------------------------------------------------------ seeds are at fault


@pytest.mark.parametrize("epoch", [8, 14])  # in GRAFTING, and blended
@pytest.mark.parametrize("guilty", [[1], [0, 3]])
def test_seeds_that_overflow_the_host_are_rolled_back_and_no_others(
    make_config: ConfigMaker, epoch: int, guilty: list[int]
) -> None:
    spoil = Spoil(epoch, spoil_seeds(*guilty))
    log, plan, reports = grow(make_config(train__epochs=24), listen=spoil)
    [line] = spoil.notes
    assert line.startswith(f"step {4 * epoch + 4} is made again: the ")
    moved = [move for move in reports[epoch + 1].moves if move[3] == "ROLLED_BACK"]
    assert [(layer, seed) for layer, seed, *_ in moved] == [(LAYER, seed) for seed in guilty]
    for seed in range(4):
        ends = [to for _, to in changes(log, LAYER, seed)]
        assert ("ROLLED_BACK" in ends) == (seed in guilty)
    for seed in guilty:
        assert changes(log, LAYER, seed)[-1] == ("ERROR", "ROLLED_BACK")
    state = read_state(log, segments(newest(log)), LAYER)
    assert (state["generation"] == 0).all()
    assert (state["alpha"][guilty] == 0).all()
    assert all(map(math.isfinite, read_losses(log).values()))
    assert len(read_losses(log)) == 96
    assert_log_replays(log, plan)


def test_a_rolled_back_seed_has_the_weights_of_its_checkpoint(make_config: ConfigMaker) -> None:
    copies: dict[str, torch.Tensor] = {}

    def spoil(engine: LocalEngine) -> None:
        bank = engine._pipeline.stages[0].trainers[LAYER].layer.bank
        copies.update({n: v[2].clone() for n, v in bank.copies().items()})
        spoil_seeds(2)(engine)

    def compare(engine: LocalEngine) -> None:
        bank = engine._pipeline.stages[0].trainers[LAYER].layer.bank
        for name, value in bank.tensors().items():
            torch.testing.assert_close(value[2], copies[name], rtol=0, atol=0)

    spoiling, comparing = Spoil(8, spoil), Spoil(9, compare)

    def listen(runtime: Runtime, report: EpochReport) -> None:
        spoiling(runtime, report)
        comparing(runtime, report)

    grow(make_config(train__epochs=11), listen=listen)
    assert len(copies) > 3


def without_commit(engine: LocalEngine) -> None:
    """Damage the state of the layer in the commit with which its seeds entered GRAFTING."""
    log = engine._coordinator._log
    state = engine._pipeline.stages[0].trainers[LAYER].layer.state
    seq = int(state.fetch("columns")[state.CHECKPOINT_ID][1])
    path = Path(log.root.url.removeprefix("file://"))
    [ref] = [r for r in manifest.segments(log.read_commit(seq)) if r.name == f"layer/{LAYER}/state"]
    (path / ref.path).write_bytes(b"damaged")


def test_a_seed_also_gets_the_strategy_and_measurements_back_that_it_was_grafted_with(
    make_config: ConfigMaker,
) -> None:
    selection = {"mode": "performance", "improving_delta": 1e-4, "improving_epochs": 1}
    selection["cooldown_epochs"] = 2
    grafting = {"strategy": "linear", "ramp_epochs": 12, "selection": selection}
    config = make_config(seeds__grafting=grafting, train__epochs=16)
    found: list[tuple[int, int]] = []

    def look(engine: LocalEngine) -> None:
        state = engine._pipeline.stages[0].trainers[LAYER].layer.state
        columns = state.fetch("columns")
        strategies = columns[state.GRAFTING_STRATEGY].tolist()
        found.extend(zip(strategies, columns[state.EVALUATION_SCORE].tolist(), strict=True))

    def spoil(engine: LocalEngine) -> None:
        look(engine)
        spoil_seeds(0, 1, 2, 3)(engine)

    log, plan, _ = grow(config, listen=Spoil(13, spoil))
    assert {strategy for strategy, _ in found} != {0}  # some have switched
    given = events_of(log, EventKind.GIVEN_BACK).of(LAYER).columns
    assert given["seed_id"].tolist() == [0, 1, 2, 3]
    state = read_state(log, segments(newest(log)), LAYER)
    assert (state["lifecycle_state"] == S.ROLLED_BACK).all()
    assert state["grafting_strategy"].tolist() == [0, 0, 0, 0]
    seq = int(state["checkpoint_id"][0])
    older = read_state(log, segments(log.read_commit(seq)), LAYER)
    for name in ("evaluation_score", "performance_metrics", "metrics_valid", "blueprint_id"):
        assert state[name].tolist() == older[name].tolist(), name
    assert state["evaluation_score"].tolist() != [score for _, score in found]
    assert_log_replays(log, plan)


def test_a_checkpoint_that_cannot_be_read_is_told_and_the_seed_is_retired_all_the_same(
    make_config: ConfigMaker,
) -> None:
    def spoil(engine: LocalEngine) -> None:
        without_commit(engine)
        spoil_seeds(1)(engine)

    spoiling = Spoil(8, spoil)
    log, plan, reports = grow(make_config(train__epochs=12), listen=spoiling)
    [problem, note] = sorted(spoiling.notes)
    assert problem.startswith(
        f"layer {LAYER!r}: seeds 1 keep their strategy and measurements, for commit "
    )
    assert "is made again" in note
    assert (LAYER, 1, "GRAFTING", "ROLLED_BACK") in reports[9].moves
    assert len(events_of(log, EventKind.GIVEN_BACK)) == 0
    assert_log_replays(log, plan)


def test_the_steps_before_the_bad_one_are_kept_as_they_were(make_config: ConfigMaker) -> None:
    """A seed that does harm from the second step of an epoch on is in the output of the first."""
    sick = {**choking([]), "train__epochs": 12}
    whole, *_ = grow(make_config("whole", **sick))

    def late(engine: LocalEngine) -> None:
        stage = engine._pipeline.stages[0]

        def spoil(_module: object, _inputs: object) -> None:
            if stage.step >= 38:
                with torch.no_grad():
                    spoil_seeds(1)(engine)

        stage.module.register_forward_pre_hook(spoil)

    log, plan, reports = grow(make_config("late", **sick), listen=Spoil(8, late))
    one, two = read_losses(log), read_losses(whole)
    assert [one[step] for step in range(38)] == [two[step] for step in range(38)]
    assert one[38] != two[38]
    assert (LAYER, 1, "GRAFTING", "ROLLED_BACK") in reports[9].moves
    columns = events_of(log, EventKind.TRANSITION).of(LAYER, 1).columns
    assert (columns["step"][-1], columns["epoch"][-1]) == (38, 8)
    assert_log_replays(log, plan)


WILD = {
    "seeds__lr": 500.0,
    "lifecycle__gates": {
        "delta_ratio_max": 1e9,
        "alpha_one_loss_ratio_max": 1e9,
        "performance_delta_min": -1.0,
        "stability_min": 0.0,
    },
    "lifecycle__error_limit": 10**6,
    "train__epochs": 14,
}
"""Seeds that learn so fast that they harm the host as soon as they are blended in."""


def test_seeds_by_which_the_loss_diverges_are_rolled_back(make_config: ConfigMaker) -> None:
    log, plan, reports = grow(make_config(**WILD))
    told = panics(log)
    assert told
    assert all("the loss has diverged to" in verdict for *_, verdict in told)
    rolled = [move for report in reports for move in report.moves if move[3] == "ROLLED_BACK"]
    assert rolled
    assert all(loss < 6 for loss in read_losses(log).values())
    assert_log_replays(log, plan)


def test_divergence_may_be_let_pass(make_config: ConfigMaker) -> None:
    log, *_ = grow(make_config(**WILD, train__divergence=0))
    assert panics(log) == []
    assert max(read_losses(log).values()) > 6


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_actors_roll_them_back_alike(make_config: ConfigMaker, ray_cluster: str) -> None:
    given = {**WILD, "cluster__address": ray_cluster}
    local, *_ = grow(make_config("local", **given))
    log, plan, _ = grow(make_config("actors", **given), local=False)
    assert panics(log) == panics(local)
    assert stored(log) == stored(local)
    assert_log_replays(log, plan)


# ------------------------------------------------------------------ the weights are at fault


def test_weights_broken_by_the_last_step_of_an_epoch_are_seen_before_the_epoch_ends(
    make_config: ConfigMaker,
) -> None:
    """What no loss of the epoch shows: an overflow in the update itself, once."""
    broken: list[int] = []

    def once(engine: LocalEngine) -> None:
        stage = engine._pipeline.stages[1]
        weight = stage.host_parameters["logits.weight"]

        def spoil(grad: torch.Tensor) -> torch.Tensor:
            if stage.step == 27 and stage.batch_stream == BATCH:
                broken.append(stage.step)
                return grad * torch.inf
            return grad

        weight.register_hook(spoil)  # type: ignore[no-untyped-call]

    log, plan, _ = grow(make_config(train__epochs=10), listen=Spoil(1, once))
    assert set(broken) == {27}
    [(step, layer, verdict)] = panics(log)
    assert (step, layer) == (27, "predictor.logits")
    assert "the gradient of weight of layer" in verdict
    assert np.isfinite(list(read_losses(log).values())).all()
    assert_log_replays(log, plan)


def test_a_fault_that_does_not_come_again_costs_nothing(make_config: ConfigMaker) -> None:
    """A flipped bit: the steps are made again, with no panic to log."""
    whole, *_ = grow(make_config("whole", train__epochs=10))
    left = [True]

    def flip(engine: LocalEngine) -> None:
        stage = engine._pipeline.stages[1]

        def spoil(grad: torch.Tensor) -> torch.Tensor:
            if stage.step == 26 and left:
                left.clear()
                return grad * torch.inf
            return grad

        weight = stage.host_parameters["logits.weight"]
        weight.register_hook(spoil)  # type: ignore[no-untyped-call]

    log, plan, _ = grow(make_config("flipped", train__epochs=10), listen=Spoil(1, flip))
    assert not left
    assert panics(log) == []
    assert stored(log) == stored(whole)
    assert_log_replays(log, plan)


def test_a_fossil_cannot_be_retired_so_that_its_harm_ends_the_run(
    make_config: ConfigMaker,
) -> None:
    spoil = Spoil(30, spoil_seeds(2))
    with pytest.raises(RunFailed, match="step 124 failed twice"):
        grow(make_config(train__epochs=34), listen=spoil)


def listener(*parts: Listener) -> Listener:
    """All of them, one after another."""

    def listen(runtime: Runtime, report: EpochReport) -> None:
        for part in parts:
            part(runtime, report)

    return listen


def test_a_request_for_a_seed_that_the_governor_has_retired_is_answered(
    make_config: ConfigMaker,
) -> None:
    answers: list[tuple[str, int]] = []

    def ask(runtime: Runtime, report: EpochReport) -> None:
        answers.extend((a.refusal.name, a.seed_id) for a in report.answers)
        if report.epoch == 8:
            runtime.request("rollback", LAYER, [1, 2])

    spoil = Spoil(8, spoil_seeds(1))
    log, plan, _ = grow(make_config(train__epochs=12), listen=listener(spoil, ask))
    assert answers == [("TERMINAL", 1), ("NONE", 2)]
    assert S.ROLLED_BACK.name in [to for _, to in changes(log, LAYER, 2)]
    assert_log_replays(log, plan)
