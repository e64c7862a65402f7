"""What is done about a step that went wrong: pure decisions, which somebody else carries out.

`govern` asks for things and is told what came of them, as a generator: to go back, to make a step
again under other conditions, to retire seeds or to skip a batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from esper_ray.errors import RunFailed
from esper_ray.growth.judging import Seed

WINDOW: Final = 32
"""Losses that say what is usual."""
NEWEST: Final = 8
"""Losses that say how high it is now."""
LEAST: Final = 16
"""Losses below which nothing is known of what is usual."""
_FLOOR: Final = 0.1
_CHANGE_TO_DEVIATION: Final = 1.4826 / math.sqrt(2)  # of independent normal values


@dataclass(frozen=True, slots=True)
class Level:
    """The losses of a run so far, in nats: the last WINDOW of them and the highest.

    A step has diverged where its loss is above every loss so far, and further above the median of
    the last NEWEST ones than `deviations` times their spread: the median change from one step to
    the next, which a trend does not widen, scaled to a standard deviation, but no less than a
    tenth of that median. 0 deviations: never.
    """

    deviations: float
    recent: tuple[float, ...] = ()
    highest: float = -math.inf

    @property
    def limit(self) -> float:
        """The largest loss that has not diverged; infinite before LEAST losses are known."""
        if not self.deviations or len(self.recent) < LEAST:
            return math.inf
        median = float(np.median(self.recent[-NEWEST:]))
        spread = _CHANGE_TO_DEVIATION * float(np.median(np.abs(np.diff(self.recent))))
        return max(self.highest, median + self.deviations * max(spread, _FLOOR * abs(median)))

    def after(self, loss: float) -> Level:
        """The same with one more good loss."""
        recent = (*self.recent, loss)[-WINDOW:]
        return replace(self, recent=recent, highest=max(self.highest, loss))

    def accepts(self, losses: Sequence[float]) -> bool:
        """Whether no step of a row of losses is bad."""
        level = self
        for loss in losses:
            if not (math.isfinite(loss) and loss <= level.limit):
                return False
            level = level.after(loss)
        return True


@dataclass(frozen=True, slots=True)
class Trial:
    """One optimiser step, with seeds `off` kept out of the output, or on another batch."""

    step: int
    off: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    other_batch: bool = False


@dataclass(frozen=True, slots=True)
class StepCheck:
    """What one stage looks like after a step; a name is (layer, tensor).

    `loss` is NaN but on the last stage. `output` is the first module output that is not finite,
    `broken` the first gradient, weight, buffer or moment of the host; `steepest` has the largest
    gradient, by its Euclidean norm.
    """

    loss: float
    output: tuple[str, str] | None
    broken: tuple[str, str] | None
    steepest: tuple[float, str, str]


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a step, and where."""

    step: int
    loss: float
    layer: str
    tensor: str
    diverged: bool

    @property
    def told(self) -> str:
        """As the end of a sentence."""
        where = f"{self.tensor} of layer {self.layer!r}"
        if self.diverged:
            return f"the loss has diverged to {self.loss:.4g}, steepest is the {where}"
        return f"the {where} is not finite, the loss is {self.loss:.4g}"


@dataclass(frozen=True, slots=True)
class Keep:
    """Copy every stage as it is now."""


@dataclass(frozen=True, slots=True)
class Back:
    """Go back to the copy that was made before `step`."""

    step: int


@dataclass(frozen=True, slots=True)
class Try:
    """Make a step, and tell each stage's StepCheck."""

    trial: Trial


@dataclass(frozen=True, slots=True)
class Retire:
    """Take these seeds, and no others, out of the run."""

    fault: Fault
    seeds: tuple[Seed, ...]


@dataclass(frozen=True, slots=True)
class Skip:
    """Note that the batch of this step is skipped."""

    fault: Fault


Ask = Keep | Back | Try | Retire | Skip
Governing = Generator[Ask, Sequence[StepCheck], None]
_Finding = Generator[Ask, Sequence[StepCheck], tuple[Seed, ...]]
_Attempt = Generator[Ask, Sequence[StepCheck], tuple[Fault | None, Level]]


def govern(first: int, steps: int, level: Level, suspects: Sequence[Seed]) -> Governing:
    """Make steps first .. first + steps - 1 again, from the copy before `first`, and mend them.

    `suspects` are the seeds in the output that may be retired. A bad step is tried again without
    the seeds that are guilty of it, or, where none is, on another batch; RunFailed where it is bad
    once more and no other seed is guilty.
    """
    panics: Counter[int] = Counter()
    skipped: set[int] = set()
    levels: dict[int, Level] = {}
    left = list(suspects)
    step = first
    yield Back(first)
    while step < first + steps:
        levels[step] = level
        yield Keep()
        fault, level = yield from _attempt(step, step, {}, skipped, level)
        if fault is None:
            step += 1
            continue
        until = step
        if fault.diverged and step > first and (yield from _is_the_weights(step, levels)):
            step -= 1  # what that one has made of the weights shows in the next loss only
        panics[step] += 1
        level = levels[step]
        fault = replace(fault, step=step)
        guilty = yield from _guilty(step, until, left, skipped, level)
        if panics[step] > 1 and not guilty:
            raise RunFailed(
                f"step {step} failed twice: {fault.told}",
                "lower the learning rate of host or seeds, or resume an earlier checkpoint by "
                "URL@step=N",
            )
        yield Back(step)
        if guilty:
            left = [seed for seed in left if seed not in guilty]
            yield Retire(fault, guilty)
        else:
            skipped.add(step)
            yield Skip(fault)


def _is_the_weights(
    step: int, levels: Mapping[int, Level]
) -> Generator[Ask, Sequence[StepCheck], bool]:
    """Whether another batch at `step` is as bad."""
    yield Back(step)
    fault, _ = yield from _attempt(step, step, {}, {step}, levels[step])
    return fault is not None


def _attempt(
    step: int,
    until: int,
    off: Mapping[str, tuple[int, ...]],
    skipped: set[int],
    level: Level,
) -> _Attempt:
    """Steps step .. until; the first fault, or the level after them."""
    for number in range(step, until + 1):
        checks = yield Try(Trial(number, off, number in skipped))
        if fault := judge(number, checks, level):
            return fault, level
        level = level.after(checks[-1].loss)
    return None, level


def _guilty(
    step: int, until: int, suspects: Sequence[Seed], skipped: set[int], level: Level
) -> _Finding:
    """The seeds that have to be off for the steps to be good; none where that is not enough.

    Each is found by halving: the last of the shortest row of suspects that has to be off.
    """

    def good(off: Sequence[Seed]) -> Generator[Ask, Sequence[StepCheck], bool]:
        yield Back(step)
        fault, _ = yield from _attempt(step, until, _by_layer(off), skipped, level)
        return fault is None

    guilty: list[Seed] = []
    left = list(suspects)
    if not left or not (yield from good(left)):
        return ()
    while not guilty or not (yield from good(guilty)):
        bad, enough = 0, len(left)
        while enough - bad > 1:
            middle = (bad + enough) // 2
            if (yield from good([*guilty, *left[:middle]])):
                enough = middle
            else:
                bad = middle
        guilty.append(left[enough - 1])
        left = left[: enough - 1]
    return tuple(sorted(guilty))


def _by_layer(seeds: Sequence[Seed]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for layer, seed_id in seeds:
        found[layer] = (*found.get(layer, ()), seed_id)
    return found


def judge(step: int, checks: Sequence[StepCheck], level: Level) -> Fault | None:
    """What is wrong with a step; `checks` come from the first stage to the last."""
    loss = checks[-1].loss
    outputs = [check.output for check in checks if check.output]
    broken = [check.broken for check in reversed(checks) if check.broken]
    if not math.isfinite(loss) or broken:
        found = outputs[:1] if not math.isfinite(loss) else []
        layer, tensor = next(iter([*found, *broken, *outputs]), ("loss", "loss"))
        return Fault(step, loss, layer, tensor, diverged=False)
    if loss > level.limit:
        _, layer, tensor = max(check.steepest for check in checks)
        return Fault(step, loss, layer, tensor, diverged=True)
    return None
