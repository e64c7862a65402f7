"""The stacked weights of a layer's seeds, with their optimiser moments and safe copies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from esper_ray.blueprints import Blueprint, BlueprintShape

FIRST_SLOTS: Final = 64


class SeedBank(nn.Module):
    """Weights (slots, ...) of one blueprint; a seed that holds something has a slot.

    A bank of few seeds has a slot for each; a larger one starts with FIRST_SLOTS and doubles.
    `tensors()` is everything that makes up a slot: weights, Adam moments and step count. `park`
    copies slots aside, `bring_back` restores them. Nothing here loops over seeds.
    """

    step_count: Tensor
    parked: Tensor
    slot_of_seed: Tensor
    """(seeds,) int32, -1 = the seed holds nothing."""
    seed_of_slot: Tensor
    """(slots,) int64, -1 = free."""

    def __init__(self, kind: Blueprint, shape: BlueprintShape, num_seeds: int) -> None:
        super().__init__()
        self.kind, self.shape, self.num_seeds = kind, shape, num_seeds
        self.specs = dict(kind.weights(shape))
        slots = min(num_seeds, FIRST_SLOTS)
        self._everyone = slots == num_seeds
        own = torch.arange(num_seeds) if self._everyone else torch.full((num_seeds,), -1)
        self.register_buffer("slot_of_seed", own.to(torch.int32))
        self.register_buffer("seed_of_slot", own if self._everyone else torch.full((slots,), -1))
        self.weights = nn.ParameterDict(
            {
                name: nn.Parameter(torch.zeros(slots, *spec.shape))
                for name, spec in self.specs.items()
            }
        )
        self.register_buffer("step_count", torch.zeros(slots, dtype=torch.int32))
        self.register_buffer("parked", torch.zeros(slots, dtype=torch.bool))
        for name in self.specs:
            for moment in ("exp_avg", "exp_avg_sq"):
                self.register_buffer(f"{moment}_{name}", torch.zeros_like(self.weights[name]))
        for name, value in list(self.tensors().items()):
            self.register_buffer(f"copy_{name}", torch.zeros_like(value))

    @property
    def num_slots(self) -> int:
        """Seeds that there is room for now."""
        return len(self.step_count)

    def slots(self, rows: Tensor) -> Tensor:
        """(rows,) int64 slots of seeds `rows`, -1 for those that hold nothing."""
        return self.slot_of_seed[rows].long()

    @property
    def weights_per_seed(self) -> int:
        """Number of weights of one seed."""
        return sum(math.prod(spec.shape) for spec in self.specs.values())

    def moments(self, name: str) -> tuple[Tensor, Tensor]:
        """Adam's first and second moment of one weight, shaped as the weight."""
        return self.get_buffer(f"exp_avg_{name}"), self.get_buffer(f"exp_avg_sq_{name}")

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that holds a row per seed, detached, by name."""
        rows: dict[str, Tensor] = {"step_count": self.step_count}
        for name in self.specs:
            rows[name] = self.weights[name].detach()
            rows[f"exp_avg_{name}"], rows[f"exp_avg_sq_{name}"] = self.moments(name)
        return rows

    def copies(self) -> dict[str, Tensor]:
        """The parked counterpart of `tensors()`."""
        return {name: self.get_buffer(f"copy_{name}") for name in self.tensors()}

    def read(self, u: Tensor | None) -> Tensor | None:
        """The host's input u (..., inputs) as (samples, inputs), None if the blueprint ignores it.

        ValueError where there is none, or one of other features.
        """
        if not self.kind.reads_input():
            return None
        given = 0 if u is None else u.shape[-1]
        if u is None or given != self.shape.inputs:
            raise ValueError(
                f"the host read {given} features, but the seeds read {self.shape.inputs}"
            )
        return u.reshape(-1, given)

    def delta(self, x: Tensor, u: Tensor | None, rows: Tensor) -> Tensor:
        """What seeds `rows` would add at alpha 1 to their chunks x (samples, rows, chunk).

        u is what `read` returned. Whatever the blueprint raises travels on; ValueError where what
        it returns is not shaped as x, since it would be broadcast in silence.
        """
        slots = self.slots(rows)
        stacked = {n: w.index_select(0, slots).to(x.dtype) for n, w in self.weights.items()}
        delta = self.kind.delta(stacked, x, x[:, 0, :0] if u is None else u)
        if delta.shape != x.shape:
            raise ValueError(
                f"blueprint {self.kind.name!r} put out {tuple(delta.shape)} for {tuple(x.shape)}"
            )
        return delta

    @torch.no_grad()
    def claim(self, rows: Tensor) -> Tensor:
        """Slots of seeds `rows`, given to those that have none yet."""
        without = rows[self.slot_of_seed[rows] < 0]
        free = (self.seed_of_slot < 0).nonzero().flatten()
        if len(free) < len(without):
            used = self.num_slots - len(free)
            self.resize(min(self.num_seeds, max(used + len(without), 2 * self.num_slots)))
            free = (self.seed_of_slot < 0).nonzero().flatten()
        chosen = free[: len(without)]
        self.slot_of_seed[without] = chosen.to(torch.int32)
        self.seed_of_slot[chosen] = without
        return self.slots(rows)

    @torch.no_grad()
    def resize(self, slots: int) -> None:
        """Room for `slots` seeds; what the first ones hold stays."""
        for name, weight in list(self.weights.items()):
            self.weights[name] = nn.Parameter(_padded(weight.detach(), slots, 0))
        for name, value in list(self.named_buffers(recurse=False)):
            if name != "slot_of_seed":
                fill = -1 if name == "seed_of_slot" else 0
                self.register_buffer(name, _padded(value, slots, fill))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(f"{prefix}step_count")
        if isinstance(stored, Tensor) and len(stored) <= self.num_seeds:
            self.resize(len(stored))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def reset(self, rows: Tensor, generation: Tensor, stream: str, first: int = 0) -> None:
        """Give seeds `rows` newborn weights; they depend on stream, seed id and generation only.

        The id of row r is first + r: the bank of a shard begins at another seed than 0.
        """
        identity = (rows.to(torch.int64) + first) << 16 | generation.to(torch.int64)
        slots = self.claim(rows)
        for value in self.tensors().values():
            value[slots] = 0
        for name, values in self.kind.newborn(self.shape, identity, stream).items():
            self.weights[name][slots] = values.to(self.weights[name])

    @torch.no_grad()
    def park(self, rows: Tensor) -> None:
        """Copy seeds `rows` aside, over any older copy."""
        copies, slots = self.copies(), self.slots(rows)
        for name, value in self.tensors().items():
            copies[name][slots] = value[slots]
        self.parked[slots] = True

    @torch.no_grad()
    def bring_back(self, rows: Tensor) -> None:
        """Restore seeds `rows` from their copies; rows without a copy stay as they are."""
        slots = self._held(rows)
        kept = slots[self.parked[slots]]
        copies: Mapping[str, Tensor] = self.copies()
        for name, value in self.tensors().items():
            value[kept] = copies[name][kept]

    @torch.no_grad()
    def put(self, rows: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Give seeds `rows` values of `tensors()`, a row each."""
        slots = self.claim(rows)
        for name, value in self.tensors().items():
            value[slots] = tensors[name].to(value)

    @torch.no_grad()
    def forget(self, rows: Tensor) -> None:
        """Drop what seeds `rows` hold and their copies; their slots are free."""
        slots = self._held(rows)
        for value in self.tensors().values():
            value[slots] = 0
        self._drop_copies(slots)
        if not self._everyone:
            self.slot_of_seed[rows] = -1
            self.seed_of_slot[slots] = -1

    @property
    def everyone(self) -> bool:
        """Whether every seed has the slot of its own number, for good."""
        return self._everyone

    @torch.no_grad()
    def drop_copies(self, rows: Tensor) -> None:
        """Drop the copies of seeds `rows`, which have nothing to go back to any more."""
        self._drop_copies(self._held(rows))

    def _drop_copies(self, slots: Tensor) -> None:
        for value in self.copies().values():
            value[slots] = 0
        self.parked[slots] = False

    @torch.no_grad()
    def clear(self) -> None:
        """Drop what every seed holds."""
        self.forget(torch.arange(self.num_seeds, device=self.slot_of_seed.device))

    def _held(self, rows: Tensor) -> Tensor:
        slots = self.slots(rows)
        return slots[slots >= 0]


def _padded(value: Tensor, slots: int, fill: int) -> Tensor:
    """The first slots of `value`, or all of them with more behind."""
    grown = value.new_full((slots, *value.shape[1:]), fill)
    kept = min(slots, len(value))
    grown[:kept] = value[:kept]
    return grown
