"""Random layers for the fused kernels, and what is right, in float64 by the blueprints."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from esper_ray.blueprints import BlueprintShape, blueprint
from esper_ray.kernels import Form, Layout, blend, cpu_blend
from esper_ray.kernels.form import alignment
from esper_ray.kernels.seeds import Seeds
from esper_ray.seeds import ChunkManager

FUSED = ("bottleneck", "autoencoder", "low_rank", "input_mlp", "input_chunk_mlp")
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Largest relative error, ||found - right|| / ||right||."""


@dataclass(frozen=True)
class Case:
    """One call: sizes, the seeds that are blended and the numbers that go in."""

    name: str
    samples: int
    chunks: ChunkManager
    hidden: int
    inputs: int
    ids: Tensor
    dtype: torch.dtype
    device: str
    seed: int = 0
    kernel: str = "triton"
    idle: tuple[int, ...] = ()
    """Seeds of the list whose alpha is 0."""

    def run(self, in_place: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Output and gradients as the kernels find them, and as they should be."""
        kind = blueprint(self.name)
        form = kind.fused
        assert form is not None
        shape = BlueprintShape(self.chunks.chunk_width, self.hidden, self.inputs)
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator)

        rows, width = len(self.ids), self.chunks.width
        # The kernels round weights to the dtype of the output; so does what is right.
        weights = {
            n: draw(rows, *s.shape) * s.shape[0] ** -0.5 for n, s in kind.weights(shape).items()
        }
        y, u = (
            t.to(self.dtype).double()
            for t in (draw(self.samples, width), draw(self.samples, self.inputs))
        )
        weights = {n: w.to(self.dtype).float() for n, w in weights.items()}
        alpha = torch.rand(self.chunks.num_seeds, generator=generator) * 0.9 + 0.1
        alpha[list(self.idle)] = 0.0
        g = draw(self.samples, width).to(self.dtype)
        right = self._right(y, u, weights, alpha, g.double())
        found = self._found(form, y, u, weights, alpha, g, in_place)
        return found, right

    def gradient(self, g: Tensor) -> Tensor:
        """The gradient of the output as it is handed over."""
        return g

    def _right(
        self, y: Tensor, u: Tensor, weights: dict[str, Tensor], alpha: Tensor, g: Tensor
    ) -> dict[str, Tensor]:
        leaves = {"y": y, "u": u, **{n: w.double() for n, w in weights.items()}}
        leaves = {n: v.clone().requires_grad_() for n, v in leaves.items()}
        rows = self.chunks.rows(self.ids)
        own = {n: leaves[n] for n in weights}
        delta = blueprint(self.name).delta(own, self.chunks.take(leaves["y"], rows), leaves["u"])
        out = self.chunks.add(leaves["y"], rows, alpha[self.ids].double()[:, None] * delta)
        out.backward(g)  # type: ignore[no-untyped-call]
        grads = {n: v.grad for n, v in leaves.items() if v.grad is not None}
        return {"out": out.detach(), **grads}

    def _found(
        self, form: Form, y: Tensor, u: Tensor, weights: dict[str, Tensor], alpha: Tensor,
        g: Tensor, in_place: bool,
    ) -> dict[str, Tensor]:  # fmt: skip
        def here(value: Tensor) -> Tensor:
            return value.to(self.device)

        leaf = here(y.to(self.dtype)).requires_grad_()
        read = here(u.to(self.dtype)).requires_grad_()
        own = {n: here(w).requires_grad_() for n, w in weights.items()}
        slots = torch.full((self.chunks.num_seeds,), -1, dtype=torch.int32)
        slots[self.ids] = torch.arange(len(self.ids), dtype=torch.int32)
        chunk, rows = self.chunks.chunk_width, self.chunks.rows(self.ids)
        seeds = Seeds(
            form,
            Layout.of(chunk, self.hidden, alignment([*self.chunks.sizes.tolist(), chunk])),
            here(self.ids),
            here(alpha),
            here(self.chunks.starts),
            here(self.chunks.sizes),
            here(slots),
            here(torch.zeros(self.chunks.num_seeds)),
            here(rows.columns),
            here(rows.kept),
            here(rows.padding),
            here(rows.own),
            here(torch.arange(len(self.ids))),
            here(alpha[self.ids]),
            rows.whole,
        )
        z = None
        if form.read is not None:
            side = own[form.read].transpose(0, 1).flatten(1)
            z = read @ side.to(self.dtype)
        listed = [own[n] for n in form.packed]
        if self.kernel == "cpu":
            out = cpu_blend.blend(leaf * 1, z, listed, seeds, in_place)
        else:
            out = blend.blend(leaf * 1, z, listed, seeds, in_place)
        out.backward(self.gradient(here(g)))  # type: ignore[no-untyped-call]
        leaves = {"y": leaf, "u": read, **own}
        grads = {n: v.grad for n, v in leaves.items() if v.grad is not None}
        return {"out": out.detach(), **grads}


def error(found: Tensor, right: Tensor) -> float:
    """Relative error in the Euclidean norm; NaN stays NaN.

    What has cancelled to next to nothing is compared with a twentieth of numbers of order 1.
    """
    gap = (found.double().cpu() - right).norm()
    return float(gap / right.norm().clamp(min=0.05 * right.numel() ** 0.5))
