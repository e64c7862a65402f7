"""The tick of a layer's seeds, run by Triton's interpreter on a CPU, against the numpy form."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_ray.errors import ConfigError
from esper_ray.grafting import STRATEGIES, GraftingSettings, LinearGrafting
from esper_ray.kernels.tick import Columns, Tick
from esper_ray.lifecycle import LAST_GENERATION, Cause, Refusal
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.seeds import ExtendedStateTensor
from esper_ray.seeds.device_tick import DeviceTick, rules_of
from tests.builders import signals, transitions, walk
from tests.kernels.moves import RULES, Life
from tests.seeds.histories import same_state

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

SEEDS = 70  # two programs, the second with threads to spare
STATES = len(S)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rules=st.sampled_from(RULES), epochs=st.integers(1, 9))
def test_the_tick_goes_the_way_of_the_state_tensor(
    seed: int, rules: GraftingSettings, epochs: int
) -> None:
    life = Life(SEEDS, "cpu", rules, seed)
    for _ in range(epochs):
        life.live()
    life.compare()


@pytest.mark.parametrize("cause", list(Cause))
def test_all_moves_between_two_states_are_judged_as_the_table_judges_them(cause: Cause) -> None:
    source, target = (part.reshape(-1).tolist() for part in np.indices((STATES, STATES)))
    plain = _states(source)
    ours = _states(source)
    batch = transitions(range(STATES**2), source, target, cause=int(cause), blueprint_id=3)
    ticks = DeviceTick(ours, GraftingSettings())
    ticks.ask(batch)
    ticks.tick(epoch=False)
    _, reason = plain.compare_and_set(batch)
    assert ticks.reasons(batch).tolist() == reason.tolist()
    ticks.settle()
    assert same_state(ours, plain)


def _states(codes: list[int]) -> ExtendedStateTensor:
    state = ExtendedStateTensor(len(codes))
    for code in S:
        walk(state, [seed for seed, own in enumerate(codes) if own == code], code)
    return state


def test_of_several_faults_the_first_check_names_one() -> None:
    state = _states([S.CULLED, S.CULLED, S.GERMINATED, S.DORMANT, S.DORMANT, S.DORMANT])
    state.generation[1] = LAST_GENERATION
    state.changed()
    batch = transitions(
        [0, 1, 2, 3, 4],
        [8, 8, 1, 5, 0],
        [99, 0, 2, 99, 1],
        generation=[1, LAST_GENERATION, 0, 0, 0],
        cause=[4, 4, 9, 9, 0],
        strategy=[9, 9, 9, 9, 4],
    )
    plain = ExtendedStateTensor(6)
    plain.load_state_dict(state.state_dict())
    ticks = DeviceTick(state, GraftingSettings())
    ticks.ask(batch)
    ticks.tick()
    assert ticks.reasons(batch).tolist() == [
        Refusal.STALE_GENERATION,
        Refusal.GENERATIONS_USED_UP,
        Refusal.UNKNOWN_STRATEGY,
        Refusal.STALE_STATE,
        Refusal.NONE,
    ]
    assert plain.compare_and_set(batch)[1].tolist() == ticks.reasons(batch).tolist()


def test_a_move_is_made_once_and_a_seed_that_asks_nothing_has_no_reason() -> None:
    state = _states([S.DORMANT, S.CULLED, S.FOSSILIZED])
    ticks = DeviceTick(state, GraftingSettings())
    batch = transitions([0, 1], [0, 8], [1, 2])
    ticks.ask(batch)
    ticks.tick(epoch=False)
    assert ticks.tick.reason.tolist() == [0, Refusal.TERMINAL, 0]
    ticks.tick(epoch=False)
    assert ticks.tick.reason.tolist() == [0, 0, 0]
    ticks.settle()
    assert state.transition_count[0] == 1


def test_a_seed_that_enters_grafting_takes_its_first_step_in_the_same_launch() -> None:
    state = _states([S.TRAINING])
    ticks = DeviceTick(state, GraftingSettings(ramp_epochs=4))
    ticks.ask(transitions([0], S.TRAINING, S.GRAFTING))
    ticks.sense(signals([0]))
    ticks.tick()
    ticks.settle()
    assert state.alpha.tolist() == [0.25]
    assert len(state.grafting) == 1


def test_a_seed_that_enters_grafting_remembers_nothing() -> None:
    plain, ours = _states([S.TRAINING, S.DORMANT]), _states([S.TRAINING, S.DORMANT])
    ticks = DeviceTick(ours, GraftingSettings())
    for left_over in (ticks.tick.floats, ticks.tick.shorts, ticks.tick.bytes):
        left_over.fill_(1)
    batch = transitions([0], S.TRAINING, S.GRAFTING)
    ticks.ask(batch)
    ticks.tick(epoch=False)
    ticks.settle()
    plain.compare_and_set(batch)
    assert same_state(ours, plain)


def test_no_address_changes() -> None:
    state = _states([S.TRAINING, S.GRAFTING])
    ticks = DeviceTick(state, GraftingSettings())
    tensors = [*state.buffers(), *(v for v in vars(ticks.tick).values() if torch.is_tensor(v))]
    before = [tensor.data_ptr() for tensor in tensors]
    ticks.ask(transitions([0], S.TRAINING, S.GRAFTING))
    ticks.sense(signals([1]))
    ticks.tick()
    ticks.settle()
    after = [*state.buffers(), *(v for v in vars(ticks.tick).values() if torch.is_tensor(v))]
    assert [tensor.data_ptr() for tensor in after] == before


@pytest.mark.parametrize(
    ("ids", "target"), [([0, 0], [1, 1]), ([2], [1]), ([-1], [1]), ([0], [-1])]
)
def test_what_has_no_place_in_a_dense_tick_is_an_error(ids: list[int], target: list[int]) -> None:
    ticks = DeviceTick(ExtendedStateTensor(2), GraftingSettings())
    with pytest.raises(ValueError, match="refuse"):
        ticks.ask(transitions(ids, S.DORMANT, target))


@pytest.fixture
def fifth() -> Iterator[None]:
    STRATEGIES[5] = type("Fifth", (LinearGrafting,), {"strategy_id": 5, "name": "fifth"})
    yield
    del STRATEGIES[5]


@pytest.mark.usefixtures("fifth")
def test_a_strategy_that_the_kernel_does_not_know_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"not linear, .*, fifth"):
        DeviceTick(ExtendedStateTensor(2), GraftingSettings())


def test_buffers_of_another_kind_are_an_error() -> None:
    state = ExtendedStateTensor(2)
    columns = Columns(*(state.get_buffer(name) for name in Columns._fields))
    wrong = columns._replace(columns=columns.columns.long())
    with pytest.raises(ValueError, match=r"columns must be contiguous torch\.int32"):
        Tick(wrong, rules_of(GraftingSettings()))


_COMPILE = """
import re
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from esper_ray.grafting import GraftingSettings
from esper_ray.kernels.triton_judge import REFUSALS, STATES
from esper_ray.kernels.triton_tick import tick_kernel
from esper_ray.seeds.device_tick import rules_of

kinds = "i32 i32 i16 fp32 u8 fp32 i16 fp64 i16 u8 i32 fp64 u8 u8 i32".split()
rules = rules_of(GraftingSettings(ramp_epochs=49))
fixed = dict(RULES=(*rules, 2 / 49), STATES=STATES, REFUSALS=REFUSALS, MOVE=True, AGE=True, BN=64)
names = tick_kernel.arg_names
kinds = [*("*" + kind for kind in kinds), "i32", *["constexpr"] * len(fixed)]
places = {(names.index(name),): value for name, value in fixed.items()}
source = ASTSource(tick_kernel, dict(zip(names, kinds, strict=True)), places)
options = {"num_warps": 2, "enable_fp_fusion": False}
ptx = compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
assert not tick_kernel.used_global_vals  # Triton compares each at every launch
print(*re.findall(r"(?:fma|div|bar)\\.[a-z0-9.]+|0d[0-9A-F]{16}", ptx))
"""


def test_compiled_for_a_gpu_it_rounds_as_numpy_rounds(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE],
        env=env | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    used = {word for word in words if not word.startswith("0d")}
    assert used == {"div.rn.f64"}
    exact = {"0d" + np.float64(x).tobytes()[::-1].hex().upper() for x in (0.005, 0.01, 0.1, 0.05)}
    assert exact <= set(words)
    assert "0d" + np.float64(2 / 49).tobytes()[::-1].hex().upper() in words
