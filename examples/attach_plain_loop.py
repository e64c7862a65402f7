"""Seeds on two models that an ordinary loop trains: a small transformer and a small ConvNet."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import esper_ray
from esper_ray import SeedConfig, SeedSession, data
from esper_ray.grafting import GraftingSettings
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.lifecycle import LifecycleManager
from esper_ray.policy import PolicySettings

Batches = Callable[[int], tuple[Tensor, Tensor]]


class TinyTransformer(nn.Module):
    """Bytes (samples, 16) to logits of the next byte (samples, 256)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.position = nn.Parameter(torch.zeros(16, width))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.head = nn.Linear(width, 256)

    def forward(self, x: Tensor) -> Tensor:
        """One pre-norm block, read at the last byte."""
        h = self.embedding(x) + self.position
        normed = self.norms[0](h)
        h = h + self.attention(normed, normed, normed, need_weights=False)[0]
        h = h + self.mlp(self.norms[1](h))
        logits: Tensor = self.head(h[:, -1])
        return logits


def tiny_convnet() -> nn.Module:
    """Images (samples, 1, 8, 8) to logits of 4 classes."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def text(samples: int, split: str) -> Batches:
    """Windows of Python's own source text, and the byte after each."""
    source = data.load("stdlib_text", window=16, cap_bytes=200_000).split(split)
    return lambda step: source.draw(samples, 0, split, step)


def stripes(samples: int, split: str) -> Batches:
    """Noisy stripes of four periods: the class is the period."""

    def draw(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(2 * step + (split == "gate"))
        y = torch.randint(4, (samples,), generator=generator)
        phase = torch.rand(samples, 1, generator=generator) * 6.3
        wave = torch.sin(torch.arange(8) * (y[:, None] + 1) * 0.7 + phase)
        noise = torch.randn(samples, 1, 8, 8, generator=generator)
        return wave[:, None, None, :] + noise, y

    return draw


def train(
    model: nn.Module, targets: Sequence[str], batches: Callable[[int, str], Batches], steps: int
) -> tuple[SeedSession, list[float]]:
    """An ordinary loop; what is added for the seeds is marked."""
    gate_x, gate_y = batches(256, "gate")(0)

    def evaluate(host: nn.Module) -> Tensor:
        return cross_entropy(host(gate_x), gate_y, reduction="none")

    config = SeedConfig(
        targets=targets,
        seeds_per_layer=4,
        epoch_steps=5,
        hidden=8,
        grafting=GraftingSettings(ramp_epochs=4, drift_threshold=0.1),
        policy=PolicySettings(germinate_after=1, max_growing=4, training_timeout=20),
        manager=LifecycleManager(minimum_epochs={S.TRAINING: 3, S.STABILIZATION: 2}),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    session = esper_ray.attach(  # seeds
        model, config, optimizer=optimizer, evaluate=evaluate, sample=gate_x
    )
    draw, losses = batches(64, "train"), []
    for step in range(steps):
        x, y = draw(step)
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        session.step()  # seeds
        losses.append(loss.item())
    return session, losses


def main() -> None:
    """Train both and say what became of their seeds."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # models this small only wait for one another's threads
    for name, model, targets, batches in (
        ("transformer", TinyTransformer(), ["mlp"], text),
        ("convnet", tiny_convnet(), ["0", "3"], stripes),
    ):
        session, losses = train(model, targets, batches, steps=250)
        print(f"{name}: loss {losses[0]:.3f} -> {sum(losses[-20:]) / 20:.3f}")
        for layer, states in session.states().items():
            print(f"  {layer}: {states}")
        print(f"  {len(session.events)} moves, last: {session.events[-1]}")


if __name__ == "__main__":
    main()
