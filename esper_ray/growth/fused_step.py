"""Between the trainer of a layer's seeds and the fused step; needs Triton."""

from __future__ import annotations

from dataclasses import asdict

from torch import Tensor

from esper_ray.growth.slot_adam import SlotAdamSettings
from esper_ray.kernels.slot_step import BankRows, SlotStep
from esper_ray.layers import LayerSeeds


class FusedStep:
    """Does in two launches what `step_rows` says, and counts the errors of the seeds at work."""

    def __init__(self, layer: LayerSeeds, settings: SlotAdamSettings) -> None:
        self._layer, self._step = layer, SlotStep(**asdict(settings))

    def tell(self, slots: Tensor, stepped: Tensor) -> Tensor:
        """Look at `slots` (rows,) and move `stepped` (slots,) from now on.

        Returns, as `take` does, where the gradient norms (slots,) are.
        """
        layer, bank = self._layer, self._layer.bank
        self._weights = tuple(bank.weights.values())
        means, squares = zip(*(bank.moments(name) for name in bank.weights), strict=True)
        self._step.tell(
            BankRows(
                self._weights,
                means,
                squares,
                bank.step_count,
                bank.seed_of_slot,
                layer.faults,
                layer.state.columns[layer.state.ERROR_COUNT],
                slots,
                stepped,
            )
        )
        return self._step.norms

    def take(self) -> Tensor | None:
        """One step; None, and nothing done, where the kernel does not take the gradients.

        Nor does it where the weights are others than it was told of: a state dict was loaded.
        """
        gradients = self._step.gradients()
        known = next(iter(self._layer.bank.weights.values())) is self._weights[0]
        if gradients is None or not known:
            return None
        self._step.take(gradients)
        self._layer.state.errors_counted()
        return self._step.norms
