"""A session in the checkpoint store: written as one commit, read back without unpickling."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from esper_ray.actors import persistence
from esper_ray.actors.run_point import RunPoint
from esper_ray.errors import ConfigError, CorruptError
from esper_ray.growth import snapshot
from esper_ray.layers.told import read
from esper_ray.lifecycle import Cause, ExtendedLifecycle
from esper_ray.session import plain_optimizer
from esper_ray.session.growing import Growing
from esper_ray.session.sites import Site
from esper_ray.session.tables import SeedEvent
from esper_ray.storage import (
    Root,
    RunCheckpoints,
    RunLog,
    SegmentRef,
    codec,
    manifest,
    split_url,
)

KIND: Final = "session"
HOST: Final = "host"
EVENTS: Final = "events"
_EVENT_SCHEMA: Final = {
    name: (np.dtype(np.int64), 0)
    for name in ("epoch", "step", "layer", "seed_id", "generation", "source", "target", "cause")
}
_log = logging.getLogger(__name__)
Options = Mapping[str, object] | None


@dataclass(frozen=True, slots=True)
class Saved:
    """A commit whose objects are whole, and what its manifest says of layers and settings."""

    log: RunLog
    seq: int
    body: Mapping[str, Any]
    point: RunPoint
    sites: tuple[Site, ...]
    segments: Mapping[str, SegmentRef]


def find(url: str, options: Options) -> Saved:
    """What URL, URL@latest or URL@step=N names; CheckpointNotFound, or CorruptError if damaged."""
    base, selector = split_url(url)
    log = RunLog(Root.open(base, options))
    stored = RunCheckpoints(log)
    seq = stored.resolve(selector)
    body = stored.load(seq)
    if body.get("run") != KIND:
        raise ConfigError(
            f"{log.root.url} holds the checkpoints of a run, not of a session",
            "resume it by `esper-ray train CONFIG --resume URL`",
        )
    try:
        sites = tuple(Site(**site) for site in body["layers"])
    except (KeyError, TypeError) as error:
        raise CorruptError(f"the layers of commit {seq} cannot be read: {error}") from error
    point = RunPoint.from_json(body)
    return Saved(log, seq, body, point, sites, {r.name: r for r in manifest.segments(dict(body))})


class Store:
    """Where a session was saved or read, so that it goes on with the history there."""

    def __init__(self) -> None:
        self._writers: dict[str, tuple[RunLog, int]] = {}
        self._source: Saved | None = None

    # ---- save ----------------------------------------------------------------------------------

    def save(
        self, growing: Growing, optimizer: Optimizer | None, url: str, options: Options
    ) -> str:
        """Create one commit; URL@step=N of it."""
        root = Root.open(url, options)
        log, seq = self._writers.get(root.url) or self._begin(root)
        state, tensors = (None, {}) if optimizer is None else plain_optimizer.to_plain(optimizer)
        tensors |= snapshot.module_tensors(growing.model, growing.layers.values())
        refs = [log.put_segment(HOST, codec.encode_tensors(tensors), "safetensors")]
        for name, layer in growing.layers.items():
            refs += persistence.save_layer(layer, log)
            measured = codec.encode_tensors(growing.trainers[name].epoch_tensors())
            refs.append(log.put_segment(_epoch(name), measured, "safetensors"))
        refs.append(_put_events(log, growing))
        log.commit(seq, _body(growing, state), refs)
        self._writers[root.url] = (log, seq + 1)
        return f"{root.url}@step={growing.steps}"

    def _begin(self, root: Root) -> tuple[RunLog, int]:
        """This session as the writer of a place: a new history, or what follows `_source`."""
        log, source = RunLog(root), self._source
        here = source is not None and source.log.root.url == root.url
        if not here and (older := len(log.commit_numbers())):
            _log.warning("%d checkpoints of others at %s are set aside", older, root.url)
        record = log.open_epoch(
            resumed_from=source.seq if source is not None and here else None,
            source=source.log.root.url if source is not None and not here else None,
        )
        return log, record.next_seq

    # ---- restore -------------------------------------------------------------------------------

    def restore(
        self, growing: Growing, optimizer: Optimizer | None, url: str, options: Options
    ) -> None:
        """Find a commit and take it over."""
        self.load(growing, optimizer, find(url, options))

    def load(self, growing: Growing, optimizer: Optimizer | None, saved: Saved) -> None:
        """Take over what was saved of this very model and these settings; all is checked first."""
        _check_settings(growing, saved)
        host = host_tensors(saved)
        present = snapshot.module_tensors(growing.model, growing.layers.values())
        check_host(present, host)
        progress = saved.point.progress
        plain = saved.body.get("optimizer")
        if optimizer is not None and plain is not None:
            plain_optimizer.load_plain(optimizer, plain, host)
        elif optimizer is not None or plain is not None:
            _log.warning("the optimizer's state is not restored: it was not given or not saved")
        for name, value in present.items():
            value.copy_(host[name])
        for layer in growing.layers.values():
            persistence.restore_layer(layer, saved.log, saved.segments)
        growing.decider.progress = progress
        _resume(growing, saved)
        self._writers, self._source = {}, saved


def _body(growing: Growing, optimizer: Any) -> dict[str, Any]:
    settings = growing.config.to_plain()
    return {
        "run": KIND,
        "step": growing.steps,
        "epoch": growing.epochs,
        "samples": 0,
        "config": settings,
        "config_digest": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "layers": [site.to_json() for site in growing.sites],
        "coordinator": growing.decider.progress.to_json(),
        "optimizer": optimizer,
        "waiting": [list(asked) for asked in growing.decider.commands.waiting],
        "observed": [repr(value) for value in growing.observed],
    }


def _resume(growing: Growing, saved: Saved) -> None:
    body, log = saved.body, saved.log
    try:
        loss, accuracy = map(float, body["observed"])
        asked = [(str(a), str(layer), int(seed)) for a, layer, seed in body["waiting"]]
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"commit {saved.seq} cannot be read: {error!r}") from error
    growing.steps, growing.epochs = saved.point.step, saved.point.epoch
    growing.observed = (loss, accuracy)
    growing.decider.commands.take({})  # forget what was asked since
    growing.decider.commands.answered()
    for action, layer, seed in asked:
        growing.decider.commands.add(action, layer, [seed])
    for name, trainer in growing.trainers.items():
        trainer.layer.epoch = growing.epochs - 1
        ref = persistence.named(saved.segments, _epoch(name))
        trainer.resume_epoch(codec.decode_tensors(log.read_segment(ref)))
    growing.events.clear()
    growing.events.extend(_read_events(growing, saved))
    growing.note_weights()


def _check_settings(growing: Growing, saved: Saved) -> None:
    for mine, theirs in zip(growing.sites, saved.sites, strict=False):
        if mine != theirs:
            ours, stored = mine.to_json(), theirs.to_json()
            name = next(key for key in ours if ours[key] != stored[key])
            raise ConfigError(
                f"layer {mine.layer_id!r} differs from {theirs.layer_id!r} of the checkpoint: "
                f"{name} is {ours[name]!r}, not {stored[name]!r}",
                "restore into the model that was saved, with the same settings",
            )
    config, kept = growing.config.to_plain(), saved.point.config
    if len(growing.sites) != len(saved.sites) or config != kept:
        differ = [k for k in sorted({*config, *kept}) if config.get(k) != kept.get(k)]
        raise ConfigError(
            f"the session was saved with other {', '.join(differ) or 'layers'}",
            "attach with the same settings, or use esper_ray.restore on a model without seeds",
        )


def check_sites(model: nn.Module, sites: Sequence[Site]) -> None:
    """ConfigError naming the first layer that this model has not, or has of another width."""
    known = dict(model.named_modules())
    for site in sites:
        host = known.get(site.layer_id)
        if host is None or type(host).__name__ != site.kind:
            found = "no such module" if host is None else f"a {type(host).__name__} there"
            raise ConfigError(
                f"layer {site.layer_id!r} of the checkpoint is a {site.kind}, this model has "
                f"{found}",
                "build the model as it was when the session was saved",
            )
        told = read(host)
        if told is not None and site.part is None and told.width != site.width:
            raise ConfigError(
                f"layer {site.layer_id!r} of the checkpoint has {site.width} features, this "
                f"model's has {told.width}",
                "build the model as it was when the session was saved",
            )


def host_tensors(saved: Saved) -> dict[str, Tensor]:
    """Parameters, buffers and optimiser tensors of the host."""
    return codec.decode_tensors(saved.log.read_segment(persistence.named(saved.segments, HOST)))


def check_host(present: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """ConfigError naming the first parameter or buffer that differs in name, shape or dtype."""
    kept = {n: v for n, v in stored.items() if n.startswith(("parameter/", "buffer/"))}
    for name in sorted({*present, *kept}):
        mine, theirs = present.get(name), kept.get(name)
        if mine is None or theirs is None or _form(mine) != _form(theirs):
            raise ConfigError(
                f"{name.replace('/', ' ', 1)} is {_form(theirs)} in the checkpoint and "
                f"{_form(mine)} in this model",
                "build the model as it was when the session was saved",
            )


def _form(value: Tensor | None) -> str:
    if value is None:
        return "absent"
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _epoch(layer_id: str) -> str:
    return persistence.layer_name(layer_id, "epoch")


def _put_events(log: RunLog, growing: Growing) -> SegmentRef:
    order = {site.layer_id: index for index, site in enumerate(growing.sites)}
    rows = [
        (
            event.epoch,
            event.step,
            order[event.layer],
            event.seed_id,
            event.generation,
            ExtendedLifecycle[event.source],
            ExtendedLifecycle[event.target],
            Cause[event.cause],
        )
        for event in growing.events
    ]
    columns = np.array(rows, dtype=np.int64).reshape(len(rows), len(_EVENT_SCHEMA)).T
    table = dict(zip(_EVENT_SCHEMA, columns, strict=True))
    return log.put_segment(EVENTS, codec.encode_table(table), "arrow", len(rows))


def _read_events(growing: Growing, saved: Saved) -> list[SeedEvent]:
    ref = persistence.named(saved.segments, EVENTS)
    table = codec.decode_table(saved.log.read_segment(ref), _EVENT_SCHEMA, ref.rows)
    names = [site.layer_id for site in growing.sites]
    try:
        return [
            SeedEvent(
                epoch,
                step,
                names[layer],
                seed,
                generation,
                ExtendedLifecycle(source).name,
                ExtendedLifecycle(target).name,
                Cause(cause).name,
            )
            for epoch, step, layer, seed, generation, source, target, cause in zip(
                *(table[name].tolist() for name in _EVENT_SCHEMA), strict=True
            )
        ]
    except (IndexError, ValueError) as error:
        raise CorruptError(f"the events of commit {saved.seq} are impossible: {error}") from error
