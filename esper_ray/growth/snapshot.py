"""A stage as columns and tensors, and back: everything that a resumed run needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from esper_ray.errors import CorruptError
from esper_ray.grafting import COLUMNS as GRAFTING_COLUMNS
from esper_ray.grafting import GraftingMemory
from esper_ray.growth.stage import Stage
from esper_ray.layers import LayerSeeds
from esper_ray.lifecycle import ExtendedLifecycle
from esper_ray.seeds import ExtendedStateTensor, SeedBank

Columns = dict[str, NDArray[Any]]
Tensors = dict[str, Tensor]
Schema = Mapping[str, tuple[np.dtype, int]]
Named = TypeVar("Named", bound=Tensor)

COLUMN_NAMES: Final = (
    "lifecycle_state",
    "blueprint_id",
    "epochs_in_state",
    "grafting_strategy",
    "parent_state",
    "checkpoint_id",
    "evaluation_score",
    "error_count",
)

_BUFFERS: Final[Mapping[str, tuple[str, str, int]]] = {
    "transition_history": ("history", "int32", 20),
    "transition_count": ("transition_count", "int16", 0),
    "performance_metrics": ("metrics", "float32", 4),
    "metrics_valid": ("metrics_valid", "uint8", 0),
    "alpha": ("alpha", "float32", 0),
    "generation": ("generation", "int16", 0),
}
"""Stored column -> (buffer, dtype, width); a buffer has its rows last, a column first."""

STATE_BUFFERS: Final = ("columns", *(buffer for buffer, _, _ in _BUFFERS.values()))
"""The buffers of a state that its table is made of; the last dimension of each is the seeds."""

STATE_SCHEMA: Final[Schema] = {
    "seed_id": (np.dtype(np.int32), 0),
    **{name: (np.dtype(np.int32), 0) for name in COLUMN_NAMES},
    **{name: (np.dtype(kind), width) for name, (_, kind, width) in _BUFFERS.items()},
}
"""Columns of a layer's state table: name -> (dtype, width), width 0 for a plain column."""

GRAFTING_SCHEMA: Final[Schema] = {
    name: (np.dtype(np.uint8) if dtype == np.bool_ else dtype, 0)
    for name, dtype in GRAFTING_COLUMNS.items()
}
"""Columns of the table of the seeds in GRAFTING; Arrow's bits are stored as bytes."""


def state_columns(state: ExtendedStateTensor) -> Columns:
    """The state of every seed, in the order of STATE_SCHEMA."""
    numbers = state.fetch("columns")
    return buffer_columns({"columns": numbers, **{n: state.host(n) for n in STATE_BUFFERS[1:]}})


def buffer_columns(buffers: Mapping[str, NDArray[Any]]) -> Columns:
    """The same from the buffers STATE_BUFFERS of a state, copied."""
    numbers = buffers["columns"]
    columns: Columns = {"seed_id": np.arange(numbers.shape[1], dtype=np.int32)}
    columns.update((name, numbers[i].copy()) for i, name in enumerate(COLUMN_NAMES))
    for name, (buffer, _, width) in _BUFFERS.items():
        value = np.moveaxis(buffers[buffer], -1, 0)
        columns[name] = (value.reshape(len(value), width) if width else value).copy()
    return columns


def grafting_columns(state: ExtendedStateTensor) -> Columns:
    """What strategies remember, a row per seed in GRAFTING, in the order of GRAFTING_SCHEMA."""
    return _stored_grafting(state.grafting)


def _stored_grafting(memory: GraftingMemory) -> Columns:
    arrays = memory.arrays()
    return {name: arrays[name].astype(dtype) for name, (dtype, _) in GRAFTING_SCHEMA.items()}


def entered_grafting(columns: Columns) -> Columns:
    """The table of grafting of seeds that have all just entered GRAFTING."""
    memory = GraftingMemory()
    memory.enter(np.flatnonzero(columns["lifecycle_state"] == ExtendedLifecycle.GRAFTING))
    return _stored_grafting(memory)


def load_state_columns(state: ExtendedStateTensor, columns: Columns, grafting: Columns) -> None:
    """Take over columns read from storage, after checking that they are possible."""
    check_state_columns(columns, grafting, state.num_seeds)
    state.grafting.load({n: grafting[n].astype(d) for n, d in GRAFTING_COLUMNS.items()})
    state.columns.copy_(torch.from_numpy(np.stack([columns[n] for n in COLUMN_NAMES])))
    for name, (buffer_name, _, _) in _BUFFERS.items():
        buffer = state.get_buffer(buffer_name)
        rows_last = columns[name].reshape(-1, *buffer.shape[:-1])
        buffer.copy_(torch.from_numpy(np.ascontiguousarray(np.moveaxis(rows_last, 0, -1))))
    state.changed()


def check_state_columns(columns: Columns, grafting: Columns, num_seeds: int) -> None:
    """Raise CorruptError where no layer of `num_seeds` seeds can be in such a state."""
    problem = _impossible(columns, grafting, num_seeds)
    if problem:
        raise CorruptError(f"stored seed state is impossible: {problem}")


def _impossible(columns: Columns, grafting: Columns, num_seeds: int) -> str | None:
    codes, alpha = columns["lifecycle_state"], columns["alpha"]
    if not np.array_equal(columns["seed_id"], np.arange(num_seeds)):
        return f"seed ids are not 0..{num_seeds - 1}"
    if not np.isin(codes, list(ExtendedLifecycle)).all():
        return "a lifecycle state is not in 0..10"
    if not ((alpha >= 0) & (alpha <= 1)).all():  # NaN fails too
        return "an alpha is not in [0, 1]"
    counts = ("epochs_in_state", "generation", "transition_count")
    if any((columns[name] < 0).any() for name in counts):
        return "a count is negative"
    in_grafting = np.flatnonzero(codes == ExtendedLifecycle.GRAFTING)
    if not np.array_equal(grafting["seed_id"], in_grafting):
        return "the table of grafting is not that of the seeds in GRAFTING"
    return None


def _row_tensors(rows: Tensor, slots: Tensor, tensors: Mapping[str, Tensor]) -> Tensors:
    picked = {name: value.index_select(0, slots).cpu() for name, value in tensors.items()}
    return {"seed_id": rows.cpu().to(torch.int32), **picked}


def grown_tensors(layer: LayerSeeds) -> Tensors:
    """Weights and moments of the seeds that hold a blueprint, one row each."""
    rows = (layer.state.columns[layer.state.BLUEPRINT_ID] >= 0).nonzero().flatten()
    return _row_tensors(rows, layer.bank.slots(rows), layer.bank.tensors())


def rollback_tensors(layer: LayerSeeds) -> Tensors:
    """Copies that seeds left when they entered GRAFTING, one row each, by seed id."""
    bank = layer.bank
    rows = bank.seed_of_slot[bank.parked].sort().values
    return _row_tensors(rows, bank.slots(rows), bank.copies())


def row_shapes(bank: SeedBank, rows: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes of `grown_tensors` and `rollback_tensors` with `rows` rows."""
    shapes = {n: (v.dtype, (rows, *v.shape[1:])) for n, v in bank.tensors().items()}
    return {"seed_id": (torch.int32, (rows,)), **shapes}


def load_rows(layer: LayerSeeds, grown: Tensors, copies: Tensors) -> None:
    """Take over the rows that `grown_tensors` and `rollback_tensors` have given.

    The state comes first. CorruptError where a seed that holds a blueprint has no weights, or a
    row belongs to no such seed.
    """
    bank = layer.bank
    for stored in (grown, copies):
        ids = stored["seed_id"].long()
        if len(torch.unique(ids)) != len(ids) or not ((ids >= 0) & (ids < bank.num_seeds)).all():
            raise CorruptError("stored seed ids repeat or are out of range")
    holding = (layer.state.columns[layer.state.BLUEPRINT_ID] >= 0).nonzero().flatten().cpu()
    if not torch.equal(grown["seed_id"].long().sort().values, holding):
        raise CorruptError("the stored weights are not those of the seeds that hold a blueprint")
    if not torch.isin(copies["seed_id"].long(), holding).all():
        raise CorruptError("a stored rollback copy is that of a seed without a blueprint")
    bank.clear()
    for stored, parts in ((grown, bank.tensors), (copies, bank.copies)):
        slots = bank.claim(stored["seed_id"].long().to(bank.slot_of_seed.device))
        for name, value in parts().items():
            value[slots] = stored[name].to(value.device)
    bank.parked[bank.slots(copies["seed_id"].long().to(bank.slot_of_seed.device))] = True
    layer.refresh()


def host_tensors(stage: Stage) -> Tensors:
    """Host parameters, host buffers and Adam's state, by name."""
    return {name: value.cpu() for name, value in live_host_tensors(stage).items()}


def live_host_tensors(stage: Stage) -> Tensors:
    """The same as they live."""
    tensors = module_tensors(stage.module, _layers(stage))
    for name, parameter in stage.host_parameters.items():
        for key, value in stage.optimizer.state.get(parameter, {}).items():
            tensors[f"adam/{name}/{key}"] = value.detach()
    return tensors


def module_tensors(module: nn.Module, layers: Iterable[LayerSeeds]) -> Tensors:
    """Parameters and buffers of a host by name, as they live, without those of its seeds."""
    grown = {id(t) for layer in layers for t in (*layer.parameters(), *layer.buffers())}
    found: Tensors = {
        f"parameter/{n}": p for n, p in module.named_parameters() if id(p) not in grown
    }
    found |= {f"buffer/{n}": b for n, b in module.named_buffers() if id(b) not in grown}
    return {name: value.detach() for name, value in found.items()}


def _layers(stage: Stage) -> list[LayerSeeds]:
    return [trainer.layer for trainer in stage.trainers.values()]


def load_host(stage: Stage, tensors: Tensors, path: str = "") -> None:
    """Take over host tensors, or of them those of the module at `path`; CorruptError as
    `check_host`, and nothing is changed then."""
    check_host(stage, tensors, path)
    for name, value in below(path, module_tensors(stage.module, _layers(stage))).items():
        value.copy_(tensors[name])
    for name, parameter in below(path, stage.host_parameters).items():
        stage.optimizer.state.pop(parameter, None)
        prefix = f"adam/{name}/"
        for key in sorted(key for key in tensors if key.startswith(prefix)):
            value = tensors[key].clone()
            moment = value.to(parameter.device) if value.ndim else value  # Adam counts on the host
            stage.optimizer.state[parameter][key.removeprefix(prefix)] = moment


def check_host(stage: Stage, tensors: Tensors, path: str = "") -> None:
    """CorruptError where a name, dtype or shape differs from those of a stage's host."""
    present = below(path, module_tensors(stage.module, _layers(stage)))
    given = below(path, tensors)
    moments = {name for name in given if name.startswith("adam/")}
    if set(given) - moments != set(present):
        raise CorruptError(
            f"host tensors differ: {sorted((set(given) - moments) ^ set(present))[:3]}"
        )
    for name, value in present.items():
        if given[name].shape != value.shape or given[name].dtype != value.dtype:
            raise CorruptError(f"host tensor {name} is {tuple(given[name].shape)} in storage")
    for name in sorted(moments):
        parameter = stage.host_parameters.get(name.partition("/")[2].rpartition("/")[0])
        if parameter is None:
            raise CorruptError(f"optimiser state {name} belongs to no parameter")
        if given[name].shape not in (torch.Size(), parameter.shape):
            raise CorruptError(f"optimiser state {name} is {tuple(given[name].shape)} in storage")


def below(path: str, tensors: Mapping[str, Named]) -> dict[str, Named]:
    """Those of the module at `path`, by names that may begin with the kind of tensor."""
    kinds = ("", "parameter/", "buffer/", "adam/")
    starts = tuple(f"{kind}{path}." for kind in kinds)
    return {n: value for n, value in tensors.items() if not path or n.startswith(starts)}


def resume_trainers(stage: Stage, step: int) -> None:
    """Continue at optimiser step `step`, an epoch boundary."""
    stage.step = step
    for trainer in stage.trainers.values():
        trainer.layer.epoch = step // trainer.epoch_steps - 1
        trainer.reset_epoch()
