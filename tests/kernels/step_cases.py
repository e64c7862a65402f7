"""Banks that were stepped by the kernel, and what is right, in float64 by `step_rows`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from esper_ray.blueprints import BlueprintShape, blueprint
from esper_ray.growth.slot_adam import SlotAdamSettings, gradient_norms, step_rows
from esper_ray.kernels.slot_step import BankRows, SlotStep
from esper_ray.seeds import SeedBank


class StepResult(NamedTuple):
    """The bank by the kernel and as it should be; errors, faults and norms of both."""

    ours: SeedBank
    right: SeedBank
    told: dict[str, Tensor]
    expected: dict[str, Tensor]


@dataclass(frozen=True)
class StepCase:
    """Some steps of a bank: its blueprint and sizes, and the slots that are listed and moved.

    `gradients` (steps, slots) are the sizes of the gradients, which may be 0 or not finite.
    """

    name: str
    shape: BlueprintShape
    settings: SlotAdamSettings
    listed: Tensor
    moves: Tensor
    faults: Tensor
    gradients: Tensor
    device: str = "cpu"
    seed: int = 0

    def bank(self) -> SeedBank:
        """Weights, moments and ages at random; the slots of many seeds are in another order."""
        slots = len(self.moves)
        made = SeedBank(blueprint(self.name), self.shape, slots)
        made.resize(slots)
        made.seed_of_slot.copy_(torch.arange(slots).flip(0))
        generator = torch.Generator().manual_seed(self.seed)
        for name, value in made.tensors().items():
            if name == "step_count":
                ages = torch.randint(0, 2000, (slots,), generator=generator) ** 2 // 2000
                value.copy_(ages)
            else:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
                if name.startswith("exp_avg_sq"):
                    value.square_().add_(0.01)
        return made

    def run(self) -> StepResult:
        """The kernel's steps, and those of `step_rows`."""
        ours = self.bank().to(self.device)
        right = self.bank().double()
        seeds, listed = right.seed_of_slot, self.listed.to(self.device)
        told = torch.zeros_like(self.moves)
        told[self.listed] = True
        failing = self.faults[seeds] & told
        expected = self.faults.clone()
        expected[seeds[self.listed]] = False
        faults = self.faults.to(self.device).float()
        errors = torch.zeros(len(faults), dtype=torch.int32, device=self.device)
        counted = torch.zeros(len(faults), dtype=torch.int32)
        step = SlotStep(**asdict(self.settings))
        step.tell(_rows(ours, listed, self.moves, faults, errors))
        for number, sizes in enumerate(self.gradients):
            self._feed(ours, right, number, sizes)
            gradients = step.gradients()
            assert gradients is not None
            step.take(gradients)
            norms = gradient_norms(right)
            step_rows(right, self.moves, norms, self.settings)
            failing |= self.moves & ~norms.isfinite()
            counted.index_add_(0, seeds, failing.int())
            failing.zero_()
        return StepResult(
            ours.cpu(),
            right,
            {"errors": errors.cpu(), "faults": faults.cpu(), "norms": step.norms[listed].cpu()},
            {"errors": counted, "faults": expected.float(), "norms": norms[self.listed]},
        )

    def _feed(self, ours: SeedBank, right: SeedBank, number: int, sizes: Tensor) -> None:
        generator = torch.Generator().manual_seed(self.seed + number + 1)
        for weight, same in zip(right.weights.values(), ours.weights.values(), strict=True):
            drawn = torch.randn(weight.shape, generator=generator)
            drawn *= sizes.nan_to_num(1, 1, 1).view(-1, *(1,) * (weight.ndim - 1))
            drawn.flatten(1)[~sizes.isfinite(), -1] = sizes[~sizes.isfinite()]
            weight.grad = drawn.double()
            same.grad = drawn.to(self.device)


def _rows(
    bank: SeedBank, listed: Tensor, moves: Tensor, faults: Tensor, errors: Tensor
) -> BankRows:
    means, squares = zip(*(bank.moments(name) for name in bank.weights), strict=True)
    return BankRows(
        tuple(bank.weights.values()),
        means,
        squares,
        bank.step_count,
        bank.seed_of_slot,
        faults,
        errors,
        listed,
        moves.to(listed.device),
    )


def check(case: StepCase) -> float:
    """Insist on what must be exact; the largest error of the rest over its limit."""
    before, (ours, right, told, expected) = case.bank().tensors(), case.run()
    assert torch.equal(told["errors"], expected["errors"])
    assert torch.equal(told["faults"], expected["faults"])
    stood = ~(case.moves & (case.gradients.isfinite() & (case.gradients != 0)).any(0))
    worst = _over(told["norms"], expected["norms"])
    for name, value in ours.tensors().items():
        assert torch.equal(value[stood].view(torch.int32), before[name][stood].view(torch.int32))
        if name == "step_count":
            assert torch.equal(value, right.step_count)
        else:
            worst = max(worst, _over(value, right.tensors()[name]))
    return worst


def _over(found: Tensor, right: Tensor) -> float:
    """Largest error over 1e-6 of each number and of 1; not finite numbers must be alike."""
    alike = (found == right) | (found.isnan() & right.isnan())
    gap = (found - right).abs() / (1e-6 * (1 + right.abs()))
    return float(torch.where(alike, 0.0, gap.nan_to_num(torch.inf)).max())
