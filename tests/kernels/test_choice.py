"""Which kernel a layer gets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esper_ray.errors import ConfigError
from esper_ray.kernels import KERNELS, Form, choose, choose_step
from esper_ray.layers import ChunkedKasminaLayer

CPU, CUDA, META = (torch.device(name) for name in ("cpu", "cuda", "meta"))
FORM = Form("w_in", None, "relu")


def test_auto_goes_by_device_and_form() -> None:
    assert choose("auto", FORM, CPU) == "cpu"
    assert choose("auto", FORM, CUDA) == "triton"  # the development extra brings Triton
    assert choose("auto", FORM, META) == "torch"
    assert choose("auto", None, CPU) == choose("auto", None, CUDA) == "torch"


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_can_be_forced(name: str) -> None:
    assert choose(name, FORM, CPU) == {"auto": "cpu"}.get(name, name)


def test_steps_go_by_device_alone_and_can_be_forced() -> None:
    assert choose_step("auto", CUDA) == "triton"
    assert choose_step("auto", CPU) == choose_step("auto", META) == "torch"
    assert choose_step("torch", CUDA) == choose_step("cpu", CPU) == "torch"
    assert choose_step("triton", CPU) == "triton"
    assert ChunkedKasminaLayer(nn.Linear(4, 8), 2, kernel="triton").step_kernel == "triton"


def test_what_cannot_be_had_is_said() -> None:
    with pytest.raises(ConfigError, match="no kernel is named 'cuda'") as caught:
        choose("cuda", FORM, CPU)
    assert "triton" in caught.value.hint
    for name in ("cpu", "triton"):
        with pytest.raises(ConfigError, match="no fused kernel"):
            choose(name, None, CPU)


def test_a_layer_says_which_kernel_it_runs() -> None:
    host = nn.Linear(4, 8)
    assert ChunkedKasminaLayer(host, 2).kernel == "cpu"
    assert ChunkedKasminaLayer(host, 2, kernel="torch").kernel == "torch"
    assert ChunkedKasminaLayer(host, 2, blueprint_name="affine").kernel == "torch"
    assert ChunkedKasminaLayer(host, 2).to("meta").kernel == "torch"
