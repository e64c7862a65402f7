"""The blend of a layer as one operation that `torch.compile` does not look into.

What the seeds of a layer do changes from step to step; a compiled graph does not. So the graph
calls this operation, which runs `LayerSeeds.blend` as it stands and keeps its autograd graph until
the backward. That one adds the gradients of seeds to their `.grad` and hands on the others, so that
a bank may grow. Once differentiable; whoever moves or copies a ticket, as saved-tensor hooks can,
gets a RuntimeError.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from esper_ray.layers.layer_seeds import LayerSeeds

_numbers: Final = itertools.count(1)
_layers: Final[WeakValueDictionary[int, LayerSeeds]] = WeakValueDictionary()
# A CUDA graph would repeat what the seeds did when it was captured. Old versions have no such tag.
_untaped: Final[dict[str, Any]] = (
    {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
)
_tickets: Final[WeakValueDictionary[int, _Ticket]] = WeakValueDictionary()


class Place:
    """How a graph names a layer: by tensors, since it would be compiled anew for other numbers."""

    def __init__(self, layer: LayerSeeds) -> None:
        number = next(_numbers)
        _layers[number] = layer
        self.called = torch.tensor([number, 0], device="cpu")
        """Number of the layer, and of calls: no two calls look alike, so none is left out."""
        self.mark = torch.zeros((), device="cpu", requires_grad=True)
        """Makes the output require a gradient where the host alone does not."""


class _Ticket(np.ndarray):
    """Number of one forward; as memory of a tensor it lives exactly as long as that is needed."""

    y: Tensor
    h: Tensor
    u: Tensor | None
    awake: bool


def blend(place: Place, h: Tensor, u: Tensor | None, alpha: Tensor | None) -> Tensor:
    """As `LayerSeeds.blend` of the layer at `place`; u is None unless its blueprint reads it."""
    _count(place.called)
    grads = torch.is_grad_enabled()
    u_grads = grads and u is not None and u.requires_grad
    y: Tensor = _blend(h, u, alpha, place.mark, place.called, grads, u_grads)[0]
    return y


@torch.library.custom_op(
    "esper_ray::count", mutates_args={"called"}, schema="(Tensor(a!) called) -> ()", **_untaped
)
def _count(called: Tensor) -> None:
    called[1] += 1


@torch.library.custom_op(
    "esper_ray::blend",
    mutates_args=(),
    schema="(Tensor h, Tensor? u, Tensor? alpha, Tensor mark, Tensor called, bool grads, "
    "bool u_grads) -> (Tensor, Tensor)",
    **_untaped,
)
def _blend(
    h: Tensor,
    u: Tensor | None,
    alpha: Tensor | None,
    mark: Tensor,  # noqa: ARG001 - for autograd alone
    called: Tensor,
    grads: bool,
    u_grads: bool,
) -> tuple[Tensor, Tensor]:
    layer = _layers[int(called[0])]
    if not grads:
        with torch.no_grad():
            y = layer.blend(h, u, alpha)
        return _own(y, h), torch.zeros(1, dtype=torch.int64, device="cpu")
    ticket = np.array([next(_numbers)]).view(_Ticket)
    ticket.awake = alpha is not None or layer.awake
    # Copies: what is kept here must not be memory that the graph will use for something else.
    ticket.h = h.clone().detach().requires_grad_()
    ticket.u = u.clone().detach().requires_grad_(u_grads) if u is not None and ticket.awake else u
    with _autograd(), torch.enable_grad():
        ticket.y = layer.blend(ticket.h, ticket.u, alpha, in_place=True)
    y = ticket.y.detach()
    y = _own(y, ticket.h if ticket.awake and ticket.y is ticket.h else h)
    if not ticket.awake:
        ticket.u = None
    _tickets[int(ticket[0])] = ticket
    return y, torch.from_numpy(ticket)


@torch.library.custom_op(
    "esper_ray::blend_backward",
    mutates_args=(),
    schema="(Tensor g, Tensor? u, Tensor mark, Tensor ticket) -> (Tensor, Tensor, Tensor)",
    **_untaped,
)
def _backward(
    g: Tensor, u: Tensor | None, mark: Tensor, ticket: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    kept = _tickets.get(int(ticket))
    if kept is None:
        raise RuntimeError("the forward of these seeds is gone: its ticket was copied or moved")
    given = g.clone() if kept.awake else g
    with _autograd():
        # Kept as long as the ticket: whether it is the last backward cannot be told here.
        torch.autograd.backward(kept.y, given, retain_graph=True)
    gh, kept.h.grad = kept.h.grad, None
    gu = None
    if kept.u is not None:
        gu, kept.u.grad = kept.u.grad, None
    return _given(gh, g), _given(gu, mark if u is None else u), torch.zeros_like(mark)


@_count.register_fake
def _(called: Tensor) -> None: ...


@_blend.register_fake
def _(h: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(h), torch.empty(1, dtype=torch.int64, device="cpu")


@_backward.register_fake
def _(g: Tensor, u: Tensor | None, mark: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(g), torch.empty_like(mark if u is None else u), torch.zeros_like(mark)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, u, _, mark, _, _, u_grads = inputs
    ctx.save_for_backward(u if u_grads else None, mark, output[1])


def _differentiate(ctx: Any, g: Tensor, _: None) -> tuple[Tensor | None, ...]:
    u, mark, ticket = ctx.saved_tensors
    gh, gu, gmark = _backward(g, u, mark, ticket)  # the mark's keeps this call from being left out
    return gh, None if u is None else gu, None, gmark, None, None, None


_blend.register_autograd(_differentiate, setup_context=_keep)


@contextmanager
def _autograd() -> Iterator[None]:
    """Autograd as outside of an operation, where the dispatcher leaves it out."""
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradCPU, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)  # AutogradCPU stands for autograd on every device
    with torch._C._ForceDispatchKeyGuard(included, excluded):
        yield


def _given(grad: Tensor | None, like: Tensor) -> Tensor:
    # Negative zero, since adding it leaves every bit of another gradient as it is.
    return torch.full_like(like, -0.0) if grad is None else _own(grad, like)


def _own(x: Tensor, like: Tensor) -> Tensor:
    """x, or a copy: an operation's output may not share memory with its input `like`, and is to
    be laid out as graphs were told."""
    fresh = torch.empty_like(like)
    shared = x.untyped_storage().data_ptr() == like.untyped_storage().data_ptr()
    return fresh.copy_(x) if shared or x.stride() != fresh.stride() else x
