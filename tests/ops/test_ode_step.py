"""Steps of samplers: noise that is the same everywhere, rounding by chance, and steps captured."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from fastzoo import ops
from fastzoo.testing.coupling import values
from fastzoo.testing.ode_step import table_of
from tests.conftest import DEVICE

# Units in the last place; the largest seen over 2^24 normals is 4.2.
ULP = 5

BACKENDS = ["reference", "cpu", "cuda", "triton"] if DEVICE == "cpu" else ["cuda", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_words_are_the_published_ones(backend: str) -> None:
    """Philox4x32-10 of Random123's kat_vectors."""
    keys = torch.tensor([[0, 0]], device=DEVICE)
    words = ops.counter_bits(keys, 4, 0, backend=backend)
    assert [f"{w:08x}" for w in words[0].tolist()] == [
        "6627e8d5",
        "e169c58d",
        "bc57ac4c",
        "9b00dbd8",
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_normals_are_box_and_mullers(backend: str) -> None:
    keys = ops.counter_keys(11, 8, DEVICE)
    words = ops.counter_bits(keys, 1 << 12, 5, backend=backend).cpu()
    found = ops.counter_normal(keys, 1 << 12, 5, backend=backend).cpu().double().flatten()
    first, second = words.unflatten(1, (-1, 2)).unbind(-1)
    u = (first.float() * 2.0**-32 + 2.0**-33).double()
    radius, angle = torch.sqrt(-2 * torch.log(u)), 2 * math.pi * second.double() / 2**32
    exact = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], -1).flatten()
    ulp = torch.exp2(torch.floor(torch.log2(exact.abs())) - 23)
    assert ((found - exact).abs() / ulp).max() <= ULP


def test_noise_is_standard_normal_and_independent() -> None:
    n = 1 << 16
    keys = torch.tensor([[1, 0], [1, 1], [2, 0], [1, 0]], device=DEVICE)
    rows = ops.counter_normal(keys, n, 1).cpu().double()
    rows[3] = ops.counter_normal(keys[3:], n, 2).cpu().double()
    count = rows.numel()
    # Within 5 standard errors of the moments of a normal distribution: 0, 1, 0, 3.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(rows.pow(power).mean() - moment) < 5 * math.sqrt(variance / count)
    assert stats.kstest(rows.flatten().numpy(), "norm").pvalue > 1e-3
    assert (torch.corrcoef(rows) - torch.eye(4)).abs().max() < 5 / math.sqrt(n)
    neighbours = torch.corrcoef(torch.stack([rows[0, :-1], rows[0, 1:]]))[0, 1]
    assert abs(neighbours) < 5 / math.sqrt(n)
    # Both normals of a pair, squared: they share a radius and an angle.
    squares = torch.corrcoef(rows[0].view(-1, 2).square().T)[0, 1]
    assert abs(squares) < 5 / math.sqrt(n / 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_has_its_noise_in_any_batch(backend: str) -> None:
    """By int seeds a sample keeps its number, by seeds of each it has none."""
    whole = ops.counter_normal(ops.counter_keys(7, 6, DEVICE), 37, 3, backend=backend)
    for part in (slice(0, 1), slice(2, 5)):
        keys = ops.counter_keys(7, 6, DEVICE)[part]
        assert torch.equal(ops.counter_normal(keys, 37, 3, backend=backend), whole[part])
    # Of a longer sample the beginning is the same.
    longer = ops.counter_normal(ops.counter_keys(7, 6, DEVICE), 120, 3, backend=backend)
    assert torch.equal(longer[:, :37], whole)
    alone = ops.counter_normal(ops.counter_keys([9], 1, DEVICE), 37, 3, backend=backend)
    beside = ops.counter_normal(ops.counter_keys([4, 9, 2], 3, DEVICE), 37, 3, backend=backend)
    assert torch.equal(beside[1:2], alone)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_steps_noise_is_the_counters(dtype: torch.dtype, backend: str) -> None:
    x = values(3, 2, 19).to(DEVICE, dtype)
    table = table_of((0.0,), noise=(1.0, 6)).to(DEVICE)
    found = ops.ode_step([x], table, seeds=[3, 1, 2], backend=backend)
    keys = ops.counter_keys([3, 1, 2], 3, DEVICE)
    expected = ops.counter_normal(keys, 38, 6, backend=backend).to(dtype).view(x.shape)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_has_its_bits_in_any_batch(backend: str) -> None:
    tensors = [values(6, 77, seed=k).to(DEVICE) for k in range(3)]
    table = table_of((0.3, -1.7), (0.1, 0.2, 0.7), earlier=((0.9,),), noise=(0.4, 2), bounds=(1.0,))
    table = table.to(DEVICE)
    keys = ops.counter_keys(5, 6, DEVICE)
    whole = ops.ode_step(tensors, table, seeds=keys, backend=backend)
    for part in (slice(0, 1), slice(3, 5)):
        split = ops.ode_step([t[part] for t in tensors], table, seeds=keys[part], backend=backend)
        assert torch.equal(split, whole[part])


def test_noise_has_the_same_bits_on_every_instruction_set(capability: str) -> None:
    keys = ops.counter_keys(3, 5)
    found = ops.counter_normal(keys, 133, 2, backend="cpu")
    assert torch.equal(found, ops.counter_normal(keys, 133, 2, backend="reference"))
    x, y = values(5, 133), values(5, 133, seed=1)
    table = table_of((0.6, -0.8), (0.0, 0.5), earlier=((0.7,),), bounds=(0.9,))
    wide = ops.ode_step([x.double(), y.double()], table, backend="reference")
    assert (ops.ode_step([x, y], table, backend="cpu").double() - wide).abs().max() < 1e-6
    rounded = ops.ode_step(
        [x.bfloat16()], table_of((1.0 + 2**-9,)), seeds=keys, stochastic=True, backend="cpu"
    )
    assert torch.equal(rounded, _stochastic(x.bfloat16(), keys, "reference"))


def _stochastic(x: Tensor, keys: Tensor, backend: str) -> Tensor:
    """Of ``x (1 + 2^-9)``, which float32 holds exactly."""
    table = table_of((1.0 + 2**-9,)).to(x.device)
    result: Tensor = ops.ode_step([x], table, seeds=keys, stochastic=True, backend=backend)
    return result


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_by_chance_has_the_right_mean(dtype: torch.dtype, backend: str) -> None:
    scales = torch.tensor([1.0, -3.0, 1000.0, 2.0**-16], device=DEVICE)
    x = (values(4, 4096).to(DEVICE) * scales[:, None]).to(dtype)
    keys = ops.counter_keys(1, 4, DEVICE)
    found = _stochastic(x, keys, backend)
    assert torch.equal(found, _stochastic(x, keys, "reference"))
    exact = x.double() * (1 + 2**-9)
    # One of the two neighbours of the exact value.
    step = torch.finfo(dtype).eps * exact.abs()
    step = torch.maximum(step, torch.tensor(2.0**-24 if dtype == torch.float16 else 0.0).to(step))
    error = found.double() - exact
    assert (error.abs() <= step).all()
    # Unbiased: the mean error of each row within 5 of its standard errors.
    assert (error.mean(1).abs() <= 5 * error.std(1) / 64).all()
    # And far from what rounding to nearest does, which loses a part of such a factor.
    nearest = (exact.to(dtype).double() - exact).abs().mean()
    assert error.mean().abs() < nearest


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounding_by_chance_ends_where_float16_does(backend: str) -> None:
    """Beyond the largest number, and what is none, goes as rounding to nearest has it."""
    keys = ops.counter_keys(1, 1, DEVICE)
    x = torch.tensor([[65504.0, -65504.0, 32752.0, math.inf, math.nan]], device=DEVICE).half()
    for factor in (1 + 2.0**-14, 1 + 2.0**-9, 2.0):
        table = table_of((factor,)).to(DEVICE)
        found = ops.ode_step([x], table, seeds=keys, stochastic=True, backend=backend)
        nearest = ops.ode_step([x], table, backend=backend)
        beyond = (x.double() * factor).abs() > 65504
        assert torch.equal(found[beyond], nearest[beyond]), factor
        assert torch.equal(found.isnan(), x.isnan())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_of_zero_hides_in_its_row_alone(backend: str) -> None:
    x = values(2, 3).to(DEVICE)
    hidden = torch.full((2, 3), math.inf, device=DEVICE)
    table = table_of((2.0, 0.0), (0.5, 1.0), earlier=((1.0,),)).to(DEVICE)
    out, first = ops.ode_step([x, hidden], table, keep=(0,), backend=backend)
    assert torch.equal(first, 2 * x)
    assert (out == math.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_low_precision_state_does_not_stall(backend: str) -> None:
    """1000 steps of x + 2^-10: bfloat16 to nearest stays at 1, by chance it arrives near 2."""
    x = torch.ones(1, 512, dtype=torch.bfloat16, device=DEVICE)
    drift = torch.full_like(x, 2.0**-7)
    steps = 16 if backend in ("triton", "cuda") and DEVICE == "cpu" else 1000
    tables = torch.cat([table_of((1.0, 2.0**-3), noise=(0.0, i)) for i in range(steps)]).to(DEVICE)
    nearest = chance = x
    for i in range(steps):
        at = torch.tensor([i], device=DEVICE)
        nearest = ops.ode_step([nearest, drift], tables, step=at, backend=backend)
        chance = ops.ode_step(
            [chance, drift], tables, step=at, seeds=4, stochastic=True, backend=backend
        )
    assert (nearest == 1).all()
    # A walk of steps of 2^-7 (2^-6 above 2): within 5 standard errors of the mean.
    assert abs(chance.double().mean() - (1 + steps * 2.0**-10)) < 5 * math.sqrt(steps / 512) * 2**-8


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_step_is_found_on_the_device(backend: str) -> None:
    x, y = values(3, 21).to(DEVICE), values(3, 21, seed=1).to(DEVICE)
    tables = [table_of((0.9, 0.1 * i), noise=(0.3, i)).to(DEVICE) for i in range(4)]
    run, counter = torch.cat(tables), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    one = other = x
    for table in tables:
        one = ops.ode_step([one, y], table, seeds=5, backend=backend)
        other = ops.ode_step([other, y], run, step=counter, seeds=5, backend=backend)
        counter += 1
    assert torch.equal(one, other)


def test_seeds_are_keys() -> None:
    assert ops.counter_keys(5, 2).tolist() == [[5, 0], [5, 1]]
    assert ops.counter_keys([5, -6], 2).tolist() == [[5, 0], [-6, 0]]
    assert ops.counter_keys(torch.tensor([5, 6]), 2).tolist() == [[5, 0], [6, 0]]
    keys = torch.tensor([[1, 2], [3, 4]])
    assert ops.counter_keys(keys, 2) is keys
    with pytest.raises(ValueError, match="64 bits"):
        ops.counter_keys(1 << 64, 2)


def test_a_gradient_does_not_see_what_a_weight_of_zero_hides() -> None:
    x = values(2, 3).requires_grad_()
    hidden = torch.full((2, 3), math.inf).requires_grad_()
    table = table_of((2.0, 0.0), (0.5, 0.0), earlier=((1.0,),), bounds=(1.0,))
    out = ops.ode_step([x, hidden], table)
    of_x, of_hidden = torch.autograd.grad(out.sum(), [x, hidden])
    assert torch.equal(of_hidden, torch.zeros(2, 3))
    inside = (2 * x).abs() <= 1
    assert torch.equal(of_x, torch.where(inside, 2.5, 0.5))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b in ("cpu", "cuda")])
def test_what_steers_a_sample_is_of_it_alone(backend: str) -> None:
    """Long samples, which several blocks or threads share, have the same bits in any batch."""
    x, y, k = (values(9, 4001, seed=seed).to(DEVICE).double() for seed in range(3))
    weights = torch.tensor([0, 0, 0.5, 0, 0, 0, 0, 0], dtype=torch.float64, device=DEVICE)
    step_size = torch.ones(1, dtype=torch.float64, device=DEVICE)

    def of(part: slice) -> tuple[Tensor, Tensor]:
        a, b, c = x[part], y[part], k[part]
        return (
            ops.guidance_factor(a, b, 7.5, 0.7, backend=backend),
            ops.step_error(a, b, [c], weights, step_size, 1e-3, 1e-4, backend=backend),
        )

    alone = [of(slice(b, b + 1)) for b in range(len(x))]
    for whole, parts in zip(of(slice(None)), zip(*alone, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))
