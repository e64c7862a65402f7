"""A grown model that runs without esper_ray."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from esper_ray.errors import ConfigError
from esper_ray.layers.hook import detach_seeds, output_of_seeds
from esper_ray.session.folding import fold, obstacle
from esper_ray.session.frozen import freeze
from esper_ray.session.placing import seeded
from esper_ray.session.sites import arguments
from esper_ray.storage import codec


@dataclass(frozen=True, slots=True)
class NotFolded:
    """A layer whose seeds could not become part of its weights, and why."""

    layer: str
    reason: str


@dataclass(frozen=True, slots=True)
class Exported:
    """What `export` made.

    `model` is a copy in eval mode. If `not_folded` is empty it is a plain module of the host's own
    classes; otherwise it still needs esper_ray, and `program`, traced where a sample was given,
    does not.
    """

    model: nn.Module
    not_folded: tuple[NotFolded, ...]
    program: ExportedProgram | None

    def save(self, path: str | Path) -> None:
        """Write PATH.safetensors, the weights, or PATH.pt2, the program with its weights.

        The first loads into the host's own class, the second by `torch.export.load`; ConfigError
        where the one asked for cannot be made.
        """
        suffix = Path(path).suffix
        if suffix == ".safetensors":
            self._require_folded()
            Path(path).write_bytes(codec.encode_tensors(self.model.state_dict()))
        elif suffix == ".pt2":
            torch.export.save(self._traced(), path)
        else:
            raise ConfigError(
                f"{path} ends neither in .safetensors nor in .pt2",
                "save weights as .safetensors, a program as .pt2",
            )

    def _require_folded(self) -> None:
        if self.not_folded:
            first = self.not_folded[0]
            raise ConfigError(
                f"the seeds of layer {first.layer!r} are no part of its weights: {first.reason}",
                "pass sample= to export, and save PATH.pt2",
            )

    def _traced(self) -> ExportedProgram:
        if self.program is None:
            raise ConfigError("no program was traced", "pass sample=, one input, to export")
        return self.program


def export(model: nn.Module, sample: Any = None, dynamic_shapes: Any = None) -> Exported:
    """A copy of `model` without seeds where they can be folded into weights; leaves it as it is.

    Seeds with alpha 0 are left out. With `sample`, one input, the copy is also traced by
    `torch.export`; `dynamic_shapes` is handed on, without it shapes are those of the sample.
    """
    plain = copy.deepcopy(model).eval()
    not_folded = []
    for name, seeds in seeded(plain).items():
        host = plain.get_submodule(name)
        if len(seeds.rows("blended")) == 0:
            detach_seeds(host)
        elif (reason := obstacle(plain, host, seeds, output_of_seeds(host))) is None:
            fold(host, seeds)
            detach_seeds(host)
        else:
            not_folded.append(NotFolded(name, reason))
            freeze(host, seeds)
    program = None if sample is None else _trace(plain, sample, dynamic_shapes)
    return Exported(plain, tuple(not_folded), program)


def _trace(model: nn.Module, sample: Any, dynamic_shapes: Any) -> ExportedProgram:
    args, kwargs = arguments(sample)
    with torch.no_grad():
        return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
