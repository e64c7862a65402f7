"""Chunks in words, for tooltips and tables."""

from __future__ import annotations

from collections.abc import Sequence

from esper_ray.picture.rows import Chunk, count_states


def plain(text: str) -> str:
    """Text that was stored, without control characters."""
    return "".join(character if character.isprintable() else "?" for character in text)


def one(chunk: Chunk) -> str:
    """Everything that is known of one chunk and its seed."""
    told = [
        f"seed {chunk.seed_id}: features {chunk.start} to {chunk.stop}",
        chunk.state.name,
        f"alpha {chunk.alpha:.3g}",
        f"health {chunk.health.name}",
        f"errors {chunk.errors}",
    ]
    if chunk.score is not None:
        told.append(f"score {chunk.score:.3g}")
    told += [f"{name} {value:.4g}" for name, value in chunk.metrics.items()]
    return ", ".join(told)


def several(chunks: Sequence[Chunk]) -> str:
    """Neighbouring chunks, their seeds by state."""
    first, last = chunks[0], chunks[-1]
    counts = ", ".join(f"{count} {state}" for state, count in count_states(chunks).items())
    return (
        f"seeds {first.seed_id} to {last.seed_id}: features {first.start} to {last.stop}, {counts}"
    )
