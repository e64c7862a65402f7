"""The keys of a run file that say where its actors run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from esper_ray.config.section import NotNegative, Rate, Section


class ClusterConfig(Section):
    """Where the actors run."""

    address: str = "local"
    """`local` starts a cluster and ends it with the run; else `auto` or HOST:PORT."""
    transport: Literal["auto", "torch_dist", "object_store"] = "auto"
    """How activations and gradients travel: `torch_dist` from device to device, `object_store`
    through Ray. `auto` means `torch_dist` where there are several actors."""
    shards: Annotated[int, Field(ge=0, le=4096)] = 0
    """Actors that share each stage whose layers can be split; 0: `gpus` over the stages, at
    least 1."""
    gpus: Annotated[int, Field(ge=0, le=4096)] = 0
    """GPUs of the run, one for each actor; 0 runs it on CPUs."""
    recompute: bool = False
    """Whether activations are computed again for the backward instead of kept in memory."""
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """Torch threads of each actor."""
    wait_for_resources_s: Rate = 120.0
    """Seconds to wait for one free CPU per stage."""
    step_timeout_s: Rate = 120.0
    """Seconds without any answer after which a step has failed."""
    answer_timeout_s: Rate = 10.0
    """Seconds after a fault in which an actor has to stop its step, or is replaced."""
    max_failures: NotNegative = 8
    """Faults in a row, without a new commit between, that a run [goes on after](faults.md)."""
    outage_timeout_s: Rate = 600.0
    """Seconds that a run waits after a fault for a store that does not answer."""
