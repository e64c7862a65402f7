"""Seeds in two models of your own, each trained by an ordinary loop on the CPU.

Run it: `python examples/attach_plain_loop.py`. Nothing is downloaded.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import esper_ray
from esper_ray import SeedConfig

# Lifecycle epochs are short, so that seeds go through their whole life within seconds; the gates
# are as they are by default but for how steady the gate loss must be in so short a time.
SHORT = {
    "germinate_after": 4,
    "minimum_epochs": {
        "TRAINING": 6,
        "GRAFTING": 6,
        "STABILIZATION": 2,
        "EVALUATING": 4,
        "FINE_TUNING": 4,
    },
    "gates": {"inconclusive_epochs": 12, "stability_min": 0.5, "final_stability_min": 0.5},
}
GRAFTING = {"ramp_epochs": 6, "strategy": "linear"}


class Transformer(nn.Module):
    """Reads a sequence of digits and says, at each place, which one comes next."""

    def __init__(self, words: int = 12, width: int = 32) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(words, width), nn.Embedding(24, width)
        self.block = nn.TransformerEncoderLayer(
            width, nhead=4, dim_feedforward=48, dropout=0.0, batch_first=True
        )
        self.head = nn.Linear(width, words)

    def forward(self, x: Tensor) -> Tensor:
        """(samples, places) words -> (samples, places, words) scores."""
        places = torch.arange(x.shape[1])
        mask = torch.full((len(places), len(places)), -torch.inf).triu(1)
        y: Tensor = self.head(self.block(self.embed(x) + self.place(places), src_mask=mask))
        return y


def sequences(samples: int, draw: torch.Generator) -> Tensor:
    """Each digit is the sum of the two before it, modulo 12."""
    x = torch.randint(12, (samples, 2), generator=draw)
    while x.shape[1] < 16:
        x = torch.cat([x, (x[:, -2:].sum(1, keepdim=True)) % 12], 1)
    return x


def sequence_losses(model: nn.Module, x: Tensor) -> Tensor:
    """(samples,) mean loss of each sequence."""
    scores = model(x[:, :-1])
    return cross_entropy(scores.transpose(1, 2), x[:, 1:], reduction="none").mean(1)


def convnet() -> nn.Module:
    """Says which of eight shapes a noisy picture of 12 x 12 shows."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 8),
    )


def pictures(samples: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Waves of eight kinds, by direction and length, in noise."""
    kind = torch.randint(8, (samples,), generator=draw)
    across, down = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    angle, length = (kind % 4) * torch.pi / 4, 1.0 + (kind // 4) * 0.8
    wave = across * angle.cos()[:, None, None] + down * angle.sin()[:, None, None]
    phase = 6 * torch.rand(samples, 1, 1, generator=draw)
    noise = torch.randn(samples, 12, 12, generator=draw)
    return (torch.sin(wave * length[:, None, None] + phase) + 1.2 * noise)[:, None], kind


def grow_transformer(steps: int = 300) -> esper_ray.SeedSession:
    """Seeds on the second matrix of the block's MLP; they read its input."""
    draw = torch.Generator().manual_seed(0)
    model, gate = Transformer(), sequences(96, draw)
    config = SeedConfig(
        targets=["block.linear2"],
        seeds_per_layer=4,
        epoch_steps=6,
        hidden=16,
        grafting=GRAFTING,
        lifecycle=SHORT,
    )
    print(esper_ray.plan(model, config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    session = esper_ray.attach(
        model, config, optimizer=optimizer, evaluate=lambda m: sequence_losses(m, gate)
    )
    for step in range(steps):
        loss = sequence_losses(model, sequences(32, draw)).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        session.step()
        if (step + 1) % 60 == 0:
            print(f"step {step + 1:4}  loss {loss.item():.3f}  {session.states()}")
    return session


def grow_convnet(steps: int = 300) -> esper_ray.SeedSession:
    """Seeds on both convolutions, chosen by class."""
    draw = torch.Generator().manual_seed(1)
    model, (x_gate, y_gate) = convnet(), pictures(256, draw)
    config = SeedConfig(
        targets=[nn.Conv2d],
        seeds_per_layer=2,
        epoch_steps=6,
        hidden=8,
        grafting=GRAFTING,
        lifecycle=SHORT,
    )
    print(esper_ray.plan(model, config))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    session = esper_ray.attach(
        model,
        config,
        optimizer=optimizer,
        evaluate=lambda m: cross_entropy(m(x_gate), y_gate, reduction="none"),
    )
    for step in range(steps):
        x, y = pictures(32, draw)
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        session.step()
        if (step + 1) % 60 == 0:
            states = str(session.states()).replace("\n", "; ")
            print(f"step {step + 1:4}  loss {loss.item():.3f}  {states}")
    return session


def main() -> None:
    """Grow both, and say what became of the seeds."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    began = time.monotonic()
    for name, grow in (("transformer", grow_transformer), ("convnet", grow_convnet)):
        session = grow()
        print(f"{name}: {session.states().counts}, {len(session.events)} transitions")
    print(f"{time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
