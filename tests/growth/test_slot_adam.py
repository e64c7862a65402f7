"""Adam per row: torch.optim.Adam for each seed alone, and stillness for everyone else."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from esper_ray.blueprints import BlueprintShape, blueprint
from esper_ray.growth.slot_adam import SlotAdamSettings, gradient_norms, step_rows
from esper_ray.seeds import SeedBank
from tests.builders import same_bits

SEEDS = 4
PLAIN = SlotAdamSettings(lr=0.01, warmup_steps=0, clip_norm=math.inf)
EVERYONE = torch.ones(SEEDS, dtype=torch.bool)


def bank() -> SeedBank:
    made = SeedBank(blueprint("autoencoder"), BlueprintShape(4, 3), SEEDS)
    made.reset(torch.arange(SEEDS), torch.zeros(SEEDS, dtype=torch.int16), "s")
    return made


def gradient(shape: torch.Size, step: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step)) * 0.3


def feed(made: SeedBank, step: int) -> None:
    for number, weight in enumerate(made.weights.values()):
        weight.grad = gradient(weight.shape, 100 * step + number)


def take(made: SeedBank, mask: Tensor, settings: SlotAdamSettings = PLAIN) -> None:
    step_rows(made, mask, gradient_norms(made), settings)


class Alone:
    """One seed as its own parameters under torch's Adam."""

    def __init__(self, made: SeedBank, row: int) -> None:
        self.row = row
        self.weights = {
            n: torch.nn.Parameter(w[row].detach().clone()) for n, w in made.weights.items()
        }
        self.optimizer = torch.optim.Adam(self.weights.values(), lr=PLAIN.lr)

    def step(self, made: SeedBank) -> None:
        for name, weight in made.weights.items():
            assert weight.grad is not None
            self.weights[name].grad = weight.grad[self.row].clone()
        self.optimizer.step()

    def matches(self, made: SeedBank) -> None:
        for name, weight in self.weights.items():
            torch.testing.assert_close(
                made.weights[name][self.row].detach(), weight.detach(), rtol=1e-5, atol=2e-6
            )


def rows(made: SeedBank, which: list[int]) -> dict[str, Tensor]:
    return {name: value[which].clone() for name, value in made.tensors().items()}


def unchanged(made: SeedBank, before: dict[str, Tensor], which: list[int]) -> bool:
    return all(same_bits(before[n], value[which]) for n, value in made.tensors().items())


def test_all_rows_together_are_adam_for_each_row() -> None:
    made = bank()
    alone = [Alone(made, row) for row in range(SEEDS)]
    for step in range(30):
        feed(made, step)
        for one in alone:
            one.step(made)
        take(made, EVERYONE)
    assert made.step_count.tolist() == [30] * SEEDS
    for one in alone:
        one.matches(made)


def test_lesson_50_a_late_row_starts_like_a_fresh_optimiser() -> None:
    made, late = bank(), torch.tensor([True, True, False, True])
    for step in range(12):
        feed(made, step)
        take(made, late)
    newcomer, old = Alone(made, 2), rows(made, [0])
    for step in range(12, 25):
        feed(made, step)
        newcomer.step(made)
        take(made, EVERYONE)
    newcomer.matches(made)
    assert made.step_count.tolist() == [25, 25, 13, 25]
    assert not unchanged(made, old, [0])


def test_frozen_rows_keep_every_bit_of_weights_and_moments() -> None:
    made = bank()
    for step in range(3):
        feed(made, step)
        take(made, EVERYONE)
    before = rows(made, [1, 3])
    feed(made, 3)
    take(made, torch.tensor([True, False, True, False]))
    assert unchanged(made, before, [1, 3])
    assert made.step_count.tolist() == [4, 3, 4, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_a_number_leaves_its_row_alone(bad: float) -> None:
    made, twin = bank(), bank()
    for one in (made, twin):
        feed(one, 0)
        take(one, EVERYONE)
        feed(one, 1)
    broken = made.weights["w_in"].grad
    assert broken is not None
    broken[2, 1, 1] = bad
    before = rows(made, [2])
    take(made, EVERYONE)
    take(twin, EVERYONE)
    assert unchanged(made, before, [2])
    assert unchanged(made, rows(twin, [0, 1, 3]), [0, 1, 3])


def test_a_row_without_gradient_is_not_moved_by_old_momentum() -> None:
    made = bank()
    feed(made, 0)
    take(made, EVERYONE)
    feed(made, 1)
    for weight in made.weights.values():
        assert weight.grad is not None
        weight.grad[3] = 0
    before = rows(made, [3])
    take(made, EVERYONE)
    assert unchanged(made, before, [3])


def test_a_bank_without_gradients_stays_as_it_is() -> None:
    made = bank()
    before = rows(made, list(range(SEEDS)))
    assert gradient_norms(made).tolist() == [0.0] * SEEDS
    take(made, EVERYONE)
    assert unchanged(made, before, list(range(SEEDS)))


def test_norms_are_over_all_weights_of_a_seed() -> None:
    made = bank()
    feed(made, 0)
    norms = gradient_norms(made)
    for row in range(SEEDS):
        pieces = [w.grad[row].flatten() for w in made.weights.values() if w.grad is not None]
        assert norms[row] == pytest.approx(float(torch.cat(pieces).norm()), rel=1e-6)


def test_a_long_gradient_is_clipped_row_by_row() -> None:
    made, twin = bank(), bank()
    feed(made, 0)
    feed(twin, 0)
    norms = gradient_norms(made)
    limit = float(norms.sort().values[1:3].mean())  # two rows above, two below
    for weight in twin.weights.values():
        assert weight.grad is not None
        scale = (limit / norms).clamp(max=1.0)
        weight.grad *= scale.view(-1, *(1,) * (weight.ndim - 1))
    take(made, EVERYONE, replace(PLAIN, clip_norm=limit))
    take(twin, EVERYONE)
    for name, value in made.tensors().items():
        torch.testing.assert_close(value, twin.tensors()[name], rtol=1e-5, atol=1e-8)


def test_warm_up_raises_the_rate_linearly_for_each_row_by_its_own_age() -> None:
    made = bank()
    warm = replace(PLAIN, warmup_steps=4)
    seen: list[list[float]] = []
    for step in range(6):
        before = made.weights["w_in"].detach().clone()
        for weight in made.weights.values():
            weight.grad = torch.ones_like(weight)  # Adam's step is then the rate itself
        take(made, torch.tensor([True, step >= 2, False, True]), warm)
        change = (before - made.weights["w_in"].detach()).flatten(1).mean(1) / PLAIN.lr
        seen.append([round(x, 3) for x in change.tolist()])
    assert [row[0] for row in seen] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [row[1] for row in seen] == [0.0, 0.0, 0.25, 0.5, 0.75, 1.0]
    assert [row[2] for row in seen] == [0.0] * 6


@pytest.mark.parametrize("slots", [[2], [3, 0], [0, 1, 3]])
def test_looking_at_few_slots_alone_changes_no_bit(slots: list[int]) -> None:
    made, twin = bank(), bank()
    few, mask = torch.tensor(slots), torch.zeros(SEEDS, dtype=torch.bool)
    mask[few] = True
    warm = replace(PLAIN, warmup_steps=4, clip_norm=1.0)
    for step in range(5):
        feed(made, step)
        feed(twin, step)
        take(made, mask, warm)
        norms = gradient_norms(twin, few)
        assert same_bits(norms[few], gradient_norms(made)[few])
        step_rows(twin, mask, norms, warm, few)
    for name, value in made.tensors().items():
        assert same_bits(twin.tensors()[name], value), name
