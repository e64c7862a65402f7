"""Seeds as Python objects in a loop: what the columns are measured against."""

from __future__ import annotations

from dataclasses import dataclass, field

from esper_ray.grafting import STRATEGIES, GraftingStrategyBase
from esper_ray.lifecycle import BLENDED_STATES, ExtendedLifecycle, GateSettings, StateTransition
from esper_ray.lifecycle.gates import GATES

_S = ExtendedLifecycle
_TABLE = {state: frozenset(targets) for state, targets in StateTransition.VALID_TRANSITIONS.items()}
_LIMITS = GateSettings()


@dataclass(slots=True)
class PlainSeed:
    """One seed: the same checks and the same bookkeeping, one attribute at a time."""

    state: ExtendedLifecycle = _S.DORMANT
    generation: int = 0
    parent: int = -1
    epochs: int = 0
    alpha: float = 0.0
    minimum: int = 0
    strategy: GraftingStrategyBase | None = None
    history: list[tuple[int, int, int, int]] = field(default_factory=list)

    def move(self, target: ExtendedLifecycle, metrics: dict[str, float], epoch: int) -> bool:
        """Judge and make one move."""
        if target not in _TABLE[self.state] or self.epochs < self.minimum:
            return False
        gate = GATES.get((self.state, target))
        if gate is not None and not gate.opens(metrics, _LIMITS):
            return False
        self.history.append((self.state, target, 0, epoch))
        del self.history[:-10]
        self.parent, self.state, self.epochs = self.state, target, 0
        self.alpha = 1.0 if target in BLENDED_STATES else 0.0
        return True

    def advance(self, metrics: dict[str, float], ramp: int) -> None:
        """One lifecycle epoch."""
        if self.state < _S.FOSSILIZED:
            self.epochs += 1
        if self.state is _S.GRAFTING and self.strategy is not None:
            self.alpha = self.strategy.compute_alpha(self.epochs, ramp, metrics)


def plain_strategy(number: int) -> GraftingStrategyBase:
    """A strategy object of its own for one seed."""
    return STRATEGIES[number]()
