"""The small convolutional net: images of several sizes, norms, stages."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from esper_ray import data
from esper_ray.models import SmallConvNet, small_convnet
from esper_ray.models.convnet import Norm

NORMS: list[Norm] = ["group", "batch"]


def images(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("colours", "height", "width"), [(1, 8, 8), (3, 32, 32), (3, 15, 9)])
def test_images_of_any_size_become_logits(
    colours: int, height: int, width: int, norm: Norm
) -> None:
    net = SmallConvNet((6, 12, 24), classes=7, inputs=colours, norm=norm)
    assert net(images(2, colours, height, width)).shape == (2, 7)


def test_blocks_after_the_first_halve_the_image() -> None:
    net = SmallConvNet((4, 8, 8))
    assert net.blocks(images(2, 1, 8, 8)).shape == (2, 8, 2, 2)


def test_channels_set_the_number_of_parameters() -> None:
    def parameters(*channels: int) -> int:
        return sum(p.numel() for p in SmallConvNet(channels).parameters())

    assert parameters(4) == 4 * 9 + 2 * 4 + 4 * 10 + 10
    assert parameters(4, 8) == 4 * 9 + 2 * 4 + 4 * 8 * 9 + 2 * 8 + 8 * 10 + 10


def test_group_norms_make_samples_independent_of_each_other() -> None:
    net, x = SmallConvNet(norm="group"), images(4, 1, 8, 8)
    torch.testing.assert_close(net(x)[:1], net(x[:1]))


@pytest.mark.parametrize("norm", NORMS)
def test_a_few_steps_lower_the_loss_on_digits(norm: Norm) -> None:
    torch.manual_seed(0)
    net, split = SmallConvNet(norm=norm), data.load("digits").train
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    losses = []
    for step in range(60):
        x, y = split.draw(64, "test", step)
        loss = cross_entropy(net(x.view(-1, 1, 8, 8)), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < losses[0] - 0.5


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("channels", [[4], [4, 8], [4, 8, 16]])
def test_stages_take_rows_of_pixels_or_images(channels: list[int], norm: Norm) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(stage.build() for stage in small_convnet(channels, norm=norm)))
    x, _ = data.load("digits").train.take(torch.arange(3))
    logits = net(x)
    assert logits.shape == (3, 10)
    torch.testing.assert_close(net(x.view(-1, 1, 8, 8)), logits)


def test_stages_have_the_weights_of_the_whole_net() -> None:
    channels = (4, 8, 16)
    parts = [p.shape for stage in small_convnet(channels) for p in stage.build().parameters()]
    assert parts == [p.shape for p in SmallConvNet(channels).parameters()]


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(ValueError, match="channels"):
        SmallConvNet(())
    with pytest.raises(ValueError, match="channels"):
        small_convnet((8, 0))
    with pytest.raises(ValueError, match="image"):
        small_convnet(image=(8, 8))
    with pytest.raises(ValueError, match="'layer'"):
        SmallConvNet(norm="layer")  # type: ignore[arg-type]
