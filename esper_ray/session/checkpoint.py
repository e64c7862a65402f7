"""A session from what was saved of one."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.optim import Optimizer

from esper_ray.errors import CorruptError, EsperError
from esper_ray.growth import snapshot
from esper_ray.session.config import SeedConfig
from esper_ray.session.evaluating import Evaluate
from esper_ray.session.growing import Growing
from esper_ray.session.placing import detach
from esper_ray.session.session import SeedSession
from esper_ray.session.storing import Saved, Store, check_host, check_sites, find, host_tensors


def restore(
    model: nn.Module,
    url: str,
    storage_options: Mapping[str, object] | None = None,
    *,
    optimizer: Optimizer | None = None,
    evaluate: Evaluate | None = None,
) -> SeedSession:
    """Attach the seeds that were saved at URL, URL@latest or URL@step=N, and load all of it.

    `model` is built as it was when it was attached; its weights are replaced, and so is the state
    of `optimizer`. Nothing is unpickled. ConfigError, naming the layer, for another architecture.
    """
    saved = find(url, storage_options)
    check_sites(model, saved.sites)
    check_host(snapshot.module_tensors(model, []), host_tensors(saved))
    growing = Growing(model, _settings(saved), saved.sites, evaluate)
    try:
        session = SeedSession(growing, optimizer, store := Store())
        store.load(growing, optimizer, saved)
    except EsperError:
        detach(model, discard=True)
        raise
    return session


def _settings(saved: Saved) -> SeedConfig:
    try:
        return SeedConfig.from_plain(dict(saved.point.config), [s.layer_id for s in saved.sites])
    except (KeyError, TypeError) as error:
        raise CorruptError(f"the settings of commit {saved.seq} cannot be read") from error
