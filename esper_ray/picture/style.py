"""How states and healths look: a colour and a letter each, so that neither is needed alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from esper_ray.lifecycle import ExtendedLifecycle
from esper_ray.picture.rows import Health

_S = ExtendedLifecycle


class StateLook(NamedTuple):
    """Letter and fill of a state."""

    letter: str
    fill: str

    @property
    def ink(self) -> str:
        """Black or white, whichever is read more easily on the fill."""
        # Of equal contrast with both is a luminance of about 0.18.
        return "#000000" if luminance(self.fill) > 0.18 else "#ffffff"


class HealthLook(NamedTuple):
    """Meaning in words, fill, and height of the mark as a share of its lane."""

    words: str
    fill: str
    height: float


STATES: Final[Mapping[ExtendedLifecycle, StateLook]] = {
    _S.DORMANT: StateLook("D", "#d9d9d9"),
    _S.GERMINATED: StateLook("G", "#f0e442"),
    _S.TRAINING: StateLook("T", "#e69f00"),
    _S.GRAFTING: StateLook("A", "#56b4e9"),
    _S.STABILIZATION: StateLook("S", "#0072b2"),
    _S.EVALUATING: StateLook("E", "#cc79a7"),
    _S.FINE_TUNING: StateLook("F", "#9be0c8"),
    _S.FOSSILIZED: StateLook("Z", "#009e73"),
    _S.CULLED: StateLook("C", "#4d4d4d"),
    _S.CANCELLED: StateLook("X", "#8c8c8c"),
    _S.ROLLED_BACK: StateLook("R", "#d55e00"),
}
"""Okabe and Ito's colours, which colour-blind people tell apart; greys where nothing grows."""

HEALTHS: Final[Mapping[Health, HealthLook]] = {
    Health.UNMEASURED: HealthLook("no error, never judged", "#8c8c8c", 0.15),
    Health.SOUND: HealthLook("no error, not harmful when last judged", "#009e73", 0.35),
    Health.HARMFUL: HealthLook("the loss was lower without it when last judged", "#e69f00", 0.6),
    Health.ERRORS: HealthLook("steps with a gradient that is not finite", "#d55e00", 0.8),
    Health.FAILING: HealthLook("more such steps than lifecycle.error_limit", "#b3003c", 1.0),
}


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb as WCAG has it, 0 to 1."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
