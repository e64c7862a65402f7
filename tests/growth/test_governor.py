"""What the governor asks for, in a world without tensors: whom it blames, when it gives up."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_ray.errors import RunFailed
from esper_ray.growth.governor import (
    LEAST,
    WINDOW,
    Ask,
    Back,
    Keep,
    Level,
    Retire,
    Skip,
    StepCheck,
    Trial,
    Try,
    govern,
    judge,
)

Seed = tuple[str, int]
GOOD = 2.0
LEVEL = Level(10.0, (GOOD,) * WINDOW, 3.0)
SEEDS = [(layer, seed) for layer in ("one", "two") for seed in range(40)]


def check(loss: float, **given: tuple[str, str]) -> StepCheck:
    return StepCheck(loss, given.get("output"), given.get("broken"), (0.5, "predictor", "weight"))


def _fine(trial: Trial, on: Collection[Seed]) -> float:
    return GOOD


@dataclass
class World:
    """Carries out what is asked; `loss` is that of a trial, given the seeds still in the output."""

    loss: Callable[[Trial, set[Seed]], float]
    seeds: set[Seed] = field(default_factory=lambda: set(SEEDS))
    asked: list[Ask] = field(default_factory=list)
    at: int = 8
    kept: set[int] = field(default_factory=lambda: {8})
    last_made: dict[int, Trial] = field(default_factory=dict)

    def run(self, steps: int = 4) -> None:
        asking = govern(8, steps, LEVEL, SEEDS)
        request: Ask | None = next(asking)
        while request is not None:
            self.asked.append(request)
            try:
                request = asking.send(self.do(request))
            except StopIteration:
                request = None

    def do(self, ask: Ask) -> list[StepCheck]:
        match ask:
            case Keep():
                self.kept = {step for step in self.kept if step == self.at - 1} | {self.at}
            case Back(step):
                assert step in self.kept
                self.at = step
            case Retire(_, seeds):
                self.seeds -= set(seeds)
            case Try(trial):
                assert trial.step == self.at
                off = {(layer, seed) for layer, ids in trial.off.items() for seed in ids}
                self.last_made[self.at] = trial
                self.at += 1
                return [check(math.nan), check(self.loss(trial, self.seeds - off))]
        return []

    def of(self, kind: type[Ask]) -> list[Ask]:
        return [ask for ask in self.asked if isinstance(ask, kind)]


def test_an_epoch_that_is_good_when_it_is_made_again_is_left_as_it_is() -> None:
    world = World(_fine)
    world.run()
    assert world.of(Retire) == world.of(Skip) == []
    assert [ask.trial for ask in world.of(Try) if isinstance(ask, Try)] == [
        Trial(step) for step in range(8, 12)
    ]


@given(st.sets(st.sampled_from(SEEDS), min_size=1, max_size=5), st.integers(8, 11))
def test_exactly_the_guilty_seeds_are_retired(guilty: set[Seed], bad: int) -> None:
    world = World(lambda trial, on: math.nan if trial.step == bad and on & guilty else GOOD)
    world.run()
    assert world.seeds == set(SEEDS) - guilty
    assert world.of(Skip) == []
    assert world.at == 12
    assert all(trial == Trial(step) for step, trial in world.last_made.items())
    assert len(world.of(Try)) <= 4 + 4 + len(guilty) * (1 + 7)  # halving 80 seeds takes 7


def test_seeds_that_only_together_do_harm_lose_one_of_them() -> None:
    together = {("one", 3), ("two", 5)}
    world = World(lambda trial, on: math.nan if trial.step == 9 and together <= on else GOOD)
    world.run()
    assert len(set(SEEDS) - world.seeds) == 1
    assert set(SEEDS) - world.seeds < together


def test_without_a_guilty_seed_the_batch_is_skipped_once_and_the_others_are_not() -> None:
    world = World(lambda trial, _on: math.inf if trial == Trial(10, trial.off) else GOOD)
    world.run()
    [skip] = world.of(Skip)
    assert isinstance(skip, Skip)
    assert (skip.fault.step, skip.fault.loss, skip.fault.diverged) == (10, math.inf, False)
    assert [trial.other_batch for trial in world.last_made.values()] == [False, False, True, False]
    assert world.seeds == set(SEEDS)


def bad_at(*steps: int) -> Callable[[Trial, Collection[Seed]], float]:
    return lambda trial, _on: math.nan if trial.step in steps else GOOD


def test_two_panics_at_the_same_step_end_the_run() -> None:
    world = World(bad_at(9))
    with pytest.raises(RunFailed, match="step 9 failed twice: the loss of layer 'loss' is not"):
        world.run()
    assert len(world.of(Skip)) == 1


def test_panics_at_several_steps_do_not() -> None:
    world = World(lambda trial, _on: GOOD if trial.other_batch else math.nan)
    world.run()
    assert [ask.fault.step for ask in world.of(Skip) if isinstance(ask, Skip)] == [8, 9, 10, 11]


def test_a_batch_that_wrecks_the_weights_is_found_by_the_loss_after_it() -> None:
    """Step 9 is made well, but leaves weights under which every batch of step 10 is bad."""
    world = World(_fine)

    def loss(trial: Trial, on: set[Seed]) -> float:
        wrecked = trial.step == 10 and not world.last_made[9].other_batch
        return 50.0 if wrecked else GOOD

    world.loss = loss
    world.run()
    [skip] = world.of(Skip)
    assert isinstance(skip, Skip)
    assert (skip.fault.step, skip.fault.diverged) == (9, True)
    assert [trial.other_batch for trial in world.last_made.values()] == [False, True, False, False]


def test_a_seed_that_wrecks_the_weights_is_found_so_too() -> None:
    world = World(_fine)

    def loss(trial: Trial, on: set[Seed]) -> float:
        if trial.step == 9:
            world.wrecked = ("two", 7) in on  # type: ignore[attr-defined]
        return 50.0 if trial.step == 10 and world.wrecked else GOOD  # type: ignore[attr-defined]

    world.loss = loss
    world.run()
    assert set(SEEDS) - world.seeds == {("two", 7)}
    assert world.of(Skip) == []


# ------------------------------------------------------------------ what is bad


def test_nothing_has_diverged_before_enough_losses_are_known() -> None:
    level = Level(10.0)
    for _ in range(LEAST - 1):
        assert level.limit == math.inf
        level = level.after(GOOD)
    assert level.after(GOOD).limit == pytest.approx(GOOD + 10 * GOOD / 10)


def test_a_loss_that_the_run_has_seen_before_has_not_diverged() -> None:
    level = Level(10.0)
    for loss in (5.0, *[0.01] * WINDOW):
        level = level.after(loss)
    assert level.accepts([4.9, 5.0])
    assert not level.accepts([5.1])


def test_divergence_can_be_left_out() -> None:
    level = Level(0.0, (GOOD,) * WINDOW, GOOD)
    assert level.accepts([1e30])
    assert not level.accepts([math.nan])
    assert not level.accepts([math.inf])


@given(st.lists(st.floats(0.0, 10.0), max_size=50))
def test_losses_within_those_of_the_run_are_accepted(losses: list[float]) -> None:
    assert Level(10.0, (GOOD,) * WINDOW, 10.0).accepts(losses)


def test_a_fault_is_named_after_the_first_output_that_is_not_a_number() -> None:
    one = check(math.nan, output=("reader.hidden", "output"), broken=("reader.hidden", "weight"))
    two = check(math.nan, output=("logits", "output"), broken=("logits", "gradient of weight"))
    fault = judge(5, [one, two], LEVEL)
    assert fault is not None
    assert (fault.layer, fault.tensor) == ("reader.hidden", "output")


def test_or_after_the_last_stage_with_a_broken_tensor_where_the_loss_is_a_number() -> None:
    masked = check(math.nan, output=("mask", "output"))
    fault = judge(5, [masked, check(GOOD, broken=("logits", "gradient of weight"))], LEVEL)
    assert fault is not None
    assert (fault.layer, fault.tensor) == ("logits", "gradient of weight")
    assert judge(5, [masked, check(GOOD)], LEVEL) is None
