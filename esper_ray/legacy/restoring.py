"""An imported layer from the store: its state, its seeds' weights, the way into a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from esper_ray.actors import persistence
from esper_ray.errors import ConfigError, CorruptError
from esper_ray.growth import snapshot
from esper_ray.growth.snapshot import Columns
from esper_ray.layers import LayerSeeds
from esper_ray.legacy.importing import BLUEPRINTS
from esper_ray.lifecycle import ExtendedLifecycle
from esper_ray.storage import RunLog, codec, manifest

_S = ExtendedLifecycle
_MAY_ROLL_BACK: Final = (_S.GRAFTING, _S.STABILIZATION, _S.EVALUATING, _S.FINE_TUNING)


@dataclass(frozen=True, slots=True)
class ImportedLayer:
    """State columns of every seed, and tensors by name of the seeds that brought a blueprint."""

    layer_id: str
    columns: Columns
    grafting: Columns
    blueprints: Mapping[int, Mapping[str, Tensor]]

    def load_into(self, layer: LayerSeeds) -> None:
        """Take over state and weights; optimiser moments are as at birth.

        ConfigError, changing nothing, where the seeds are other in number or a seed's tensors are
        not those of the layer's blueprint.
        """
        bank = layer.bank
        wanted = {name: value.shape[1:] for name, value in bank.weights.items()}
        if layer.state.num_seeds != len(self.columns["seed_id"]):
            raise ConfigError(
                f"layer {self.layer_id!r} was imported with {len(self.columns['seed_id'])} seeds, "
                f"this one has {layer.state.num_seeds}"
            )
        held = np.flatnonzero(self.columns["blueprint_id"] >= 0)
        for seed in held.tolist():
            found = {name: value.shape for name, value in self.blueprints.get(seed, {}).items()}
            if found != wanted:
                raise ConfigError(
                    f"seed {seed} of {self.layer_id!r} brought {_forms(found)}, the blueprint of "
                    f"this layer has {_forms(wanted)}",
                    "build the layer with the blueprint that the records are of",
                )
        snapshot.load_state_columns(layer.state, self.columns, self.grafting)
        bank.clear()
        slots = bank.claim(torch.from_numpy(held).to(bank.slot_of_seed.device))
        for name, value in bank.weights.items():
            for slot, seed in zip(slots.tolist(), held.tolist(), strict=True):
                value.data[slot] = self.blueprints[seed][name].to(value)
        parked = held[np.isin(self.columns["lifecycle_state"][held], _MAY_ROLL_BACK)]
        bank.park(torch.from_numpy(parked).to(bank.slot_of_seed.device))
        layer.refresh()


def _forms(shapes: Mapping[str, torch.Size]) -> str:
    return ", ".join(f"{name} {tuple(shape)}" for name, shape in sorted(shapes.items())) or "none"


def restore_layer(log: RunLog, seq: int, layer_id: str) -> ImportedLayer:
    """One layer of an imported commit; CorruptError where it is damaged or has no such layer."""
    segments = {ref.name: ref for ref in manifest.segments(log.read_commit(seq))}
    columns, grafting = persistence.read_tables(log, segments, layer_id)
    ref = persistence.named(segments, persistence.layer_name(layer_id, BLUEPRINTS))
    blueprints: dict[int, dict[str, Tensor]] = {}
    for name, tensor in codec.decode_tensors(log.read_segment(ref)).items():
        number, _, parameter = name.partition("/")
        plain = number.isascii() and number.isdigit() and len(number) < 10
        if not plain or int(number) >= len(columns["seed_id"]) or not parameter:
            raise CorruptError(f"an imported tensor is named {name[:80]!r}")
        blueprints.setdefault(int(number), {})[parameter] = tensor
    return ImportedLayer(layer_id, columns, grafting, blueprints)
