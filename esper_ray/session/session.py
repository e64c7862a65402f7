"""What stands between a training loop and the seeds of its model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from torch import nn
from torch.optim import Optimizer

from esper_ray.config.schema import nearest
from esper_ray.errors import ConfigError
from esper_ray.lifecycle import ExtendedLifecycle, Refusal, move_of
from esper_ray.session.config import SeedConfig
from esper_ray.session.evaluating import Evaluate
from esper_ray.session.growing import Growing
from esper_ray.session.sites import find_sites
from esper_ray.session.storing import Store
from esper_ray.session.tables import ROOT, LayerStates, SeedEvent, States


def attach(
    model: nn.Module,
    config: SeedConfig,
    optimizer: Optimizer | None = None,
    evaluate: Evaluate | None = None,
    *,
    sample: Any = None,
) -> SeedSession:
    """Give modules of `model` seeds, in place; its output stays the same, bit for bit.

    `optimizer` is the host's; one that holds seed parameters is refused. `evaluate(model)` returns
    the loss of each sample of a gate split, in a fixed order; without it no seed passes a gate
    that compares losses. `sample`, one input, is run once to learn widths that classes hide.
    """
    sites = find_sites(model, config, sample)
    return SeedSession(Growing(model, config, sites, evaluate), optimizer)


class SeedSession:
    """The seeds of a model that you train yourself; made by `attach` and `restore`."""

    def __init__(
        self, growing: Growing, optimizer: Optimizer | None, store: Store | None = None
    ) -> None:
        self._growing, self._optimizer = growing, optimizer
        self._store = Store() if store is None else store
        self._refuse_seeds_in_optimizer()

    # ---- training ------------------------------------------------------------------------------

    def step(self) -> None:
        """Train the seeds by one step; call it after the optimiser's.

        Every `epoch_steps` calls a lifecycle epoch ends: seeds are judged and change their states,
        which nothing else does. RuntimeError in eval mode.
        """
        self._require_attached()
        if not self._growing.model.training:
            raise RuntimeError("the model is in eval mode: call model.train() before session.step")
        self._refuse_seeds_in_optimizer()
        self._refuse_touched_weights()
        self._growing.step()

    def observe(self, loss: float | None = None, accuracy: float | None = None) -> None:
        """Report what you measured of the gate split in this epoch.

        A loss counts for stability where no `evaluate` was given, and never for what a seed gains;
        an accuracy is kept with the metrics. Both hold for the epoch that ends next.
        """
        for name, value in (("loss", loss), ("accuracy", accuracy)):
            if value is not None and not math.isfinite(value):
                raise ConfigError(f"the {name} observed is {value}", "report finite numbers only")
        self._growing.observe(loss, accuracy)

    def request(
        self, action: str, seed_ids: Sequence[int], layer: str | None = None
    ) -> list[Refusal]:
        """Ask to germinate, cancel, cull, rollback or replant some seeds of a layer.

        Refusal.NONE for a seed means that it is done when the epoch ends, if its state and the
        budgets still allow it. ConfigError for an unknown action or layer.
        """
        move_of(action)
        return self._growing.request(action, seed_ids, self._layer(layer))

    def _layer(self, layer: str | None) -> str:
        known = list(self._growing.layers)
        if layer is None and len(known) == 1:
            return known[0]
        if layer is None:
            raise ConfigError(
                f"{len(known)} layers carry seeds", f"name one: {', '.join(map(repr, known))}"
            )
        if layer not in known:
            raise ConfigError(f"layer {layer!r} carries no seeds{nearest(layer, known)}")
        return layer

    # ---- what is to be seen --------------------------------------------------------------------

    def states(self) -> States:
        """The state of every seed, layer by layer."""
        return States(
            tuple(
                LayerStates(
                    name,
                    tuple(ExtendedLifecycle(s).name for s in layer.state.view().state.tolist()),
                )
                for name, layer in self._growing.layers.items()
            )
        )

    @property
    def events(self) -> list[SeedEvent]:
        """The newest 10,000 changes of state, oldest first; saved and restored."""
        return list(self._growing.events)

    @property
    def steps(self) -> int:
        """Calls of `step` so far."""
        return self._growing.steps

    def parameters(self) -> list[nn.Parameter]:
        """Parameters of the seeds, which `step` moves and no other optimiser may hold."""
        return [p for layer in self._growing.layers.values() for p in layer.parameters()]

    def __repr__(self) -> str:
        return f"SeedSession at step {self.steps}\n{self.states()}"

    def _repr_html_(self) -> str:
        """The states as a table, for notebooks."""
        rows = "".join(
            f"<tr><td>{escape(one.layer or ROOT)}</td><td>{state}</td><td>{n}</td></tr>"
            for one in self.states().layers
            for state, n in one.counts.items()
        )
        head = "<tr><th>layer</th><th>state</th><th>seeds</th></tr>"
        return f"<table><caption>step {self.steps}</caption>{head}{rows}</table>"

    # ---- storage -------------------------------------------------------------------------------

    def save(self, url: str, storage_options: Mapping[str, object] | None = None) -> str:
        """Commit the model, its optimiser and all of the seeds at a URL; returns URL@step=N.

        Any fsspec URL or path. After `restore` training goes on bit for bit; what your own loop
        draws at random is yours to keep.
        """
        self._require_attached()
        return self._store.save(self._growing, self._optimizer, url, storage_options)

    def restore(self, url: str, storage_options: Mapping[str, object] | None = None) -> None:
        """Go back to what was saved at URL, URL@latest or URL@step=N; never unpickles.

        ConfigError, naming the layer, where model or seeds are of other shapes.
        """
        self._require_attached()
        self._store.restore(self._growing, self._optimizer, url, storage_options)

    # ---- what must hold ------------------------------------------------------------------------

    def _require_attached(self) -> None:
        if (name := self._growing.lost()) is not None:
            raise ConfigError(
                f"layer {name!r} carries the seeds of this session no more",
                "attach seeds again, or restore a saved session",
            )

    def _refuse_touched_weights(self) -> None:
        if (name := self._growing.touched()) is None:
            return
        self._growing.note_weights()  # who meant to may go on
        raise ConfigError(
            f"weights of seeds of layer {name!r} were changed by something else than session.step",
            "leave session.parameters() out of your optimizer; load weights by session.restore",
        )

    def _refuse_seeds_in_optimizer(self) -> None:
        if self._optimizer is None:
            return
        own = {id(parameter) for parameter in self.parameters()}
        held = (p for group in self._optimizer.param_groups for p in group["params"])
        if any(id(parameter) in own for parameter in held):
            raise ConfigError(
                "the optimizer holds parameters of seeds, which session.step moves",
                "make the optimizer before attaching, or leave out session.parameters()",
            )
