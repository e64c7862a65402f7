"""Which modules of a model are meant."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from esper_ray.errors import ConfigError, NoMatch
from esper_ray.growth.assembly import no_match, refuse_nested
from esper_ray.layers.hook import CHILD
from esper_ray.session.config import Selector

_NEVER_CALLED = (
    nn.ModuleList,
    nn.ModuleDict,
    nn.ParameterList,
    nn.ParameterDict,
    NonDynamicallyQuantizableLinear,  # attention reads its weights and passes its forward by
)


def match(
    model: nn.Module, targets: Sequence[Selector], exclude: Sequence[Selector]
) -> dict[str, nn.Module]:
    """Modules by name, in the model's order; NoMatch where an entry matches none."""
    known = {
        name: module
        for name, module in model.named_modules()
        if CHILD not in name.split(".") and not isinstance(module, _NEVER_CALLED)
    }
    wanted = _matching("targets", targets, known)
    unwanted = _matching("exclude", exclude, known)
    chosen = {n: m for n, m in known.items() if n in wanted and n not in unwanted}
    if not chosen:
        raise NoMatch("exclude leaves no module of targets", "exclude fewer modules")
    if "" in chosen and len(chosen) > 1:
        raise ConfigError(
            "targets match the model itself and modules inside it", "target one of the two"
        )
    refuse_nested(list(chosen))
    return chosen


def _matching(key: str, selectors: Sequence[Selector], known: dict[str, nn.Module]) -> set[str]:
    found: set[str] = set()
    for selector in selectors:
        hits = {name for name, module in known.items() if _hit(selector, name, module)}
        if not hits:
            raise _nothing(key, selector, known)
        found |= hits
    return found


def _hit(selector: Selector, name: str, module: nn.Module) -> bool:
    if isinstance(selector, str):
        return selector == name or (name != "" and fnmatchcase(name, selector))
    if isinstance(selector, type):
        return isinstance(module, selector)
    return bool(selector(name, module))


def _nothing(key: str, selector: Selector, known: dict[str, nn.Module]) -> NoMatch:
    if isinstance(selector, str):
        return no_match(key, selector, list(known))
    name = getattr(selector, "__qualname__", repr(selector))
    if isinstance(selector, type):
        return no_match(key, name, sorted({type(module).__name__ for module in known.values()}))
    return NoMatch(f"{key} entry {name} accepts no module", "it is called with name and module")
