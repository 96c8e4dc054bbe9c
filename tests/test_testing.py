"""The oracles themselves: each planted fault is seen, and nothing right is refused."""

import pytest
import torch

from fastzoo.testing import (
    assert_gradient_close,
    assert_same_outputs,
    deviation,
    unit_roundoff,
)
from fastzoo.testing.nms import clustered_boxes, random_boxes
from fastzoo.testing.timing import measure, peak_memory
from fastzoo.testing.vq import random_codes, tolerance


def gradient() -> torch.Tensor:
    return torch.randn(1000, dtype=torch.double, generator=torch.Generator().manual_seed(0))


def test_gradient_oracle_accepts_rounding() -> None:
    exact = gradient()
    assert_gradient_close(exact.float(), exact, rtol=unit_roundoff(torch.float32))
    assert_gradient_close(torch.zeros(0), torch.zeros(0).double(), rtol=0)


@pytest.mark.parametrize(
    ("fault", "view"),
    [
        (lambda g: g.index_add(0, torch.tensor([7]), g.new_tensor([0.02])), "elementwise"),
        (lambda g: g + 0.0016 * gradient().flip(0).sign(), "relative L2"),
        (lambda g: g + 0.0007, "signed bias"),
        (lambda g: g.where(g < 2, torch.nan), "not finite"),
        (lambda g: g[:-1], "shape"),
    ],
)
def test_gradient_oracle_sees(fault, view: str) -> None:
    with pytest.raises(AssertionError, match=view):
        assert_gradient_close(fault(gradient()), gradient(), rtol=8e-4)


def test_gradient_oracle_where_zero_is_right() -> None:
    zero = torch.zeros(3, dtype=torch.double)
    assert_gradient_close(zero, zero, rtol=0)
    with pytest.raises(AssertionError, match="zero is right"):
        assert_gradient_close(zero + 1e-30, zero, rtol=1)


def test_gradient_oracle_knows_cancellation() -> None:
    tiny = gradient() * 1e-12
    assert_gradient_close(tiny + 1e-9, tiny, rtol=1e-8, cancelled=1.0)
    with pytest.raises(AssertionError):
        assert_gradient_close(tiny + 1e-7, tiny, rtol=1e-8, cancelled=1.0)


def test_deviation_sees_each_part_of_a_gradient() -> None:
    value = torch.tensor(3.0, dtype=torch.double)
    rows = torch.ones(1000, 4, dtype=torch.double)
    rows[0] = 1e6  # a label's row hides the others in a norm
    right = (value, rows, torch.tensor(0.1))
    assert deviation(right, right) == 0
    for number, fault, expected in (
        (0, lambda t: t + 0.01, 0.01),  # of a large scalar absolute
        (2, lambda t: t + 0.01, 0.1),  # of a small one relative
        (1, lambda t: t.index_fill(0, torch.tensor([0]), 1.1e6), 0.1),
        (1, lambda t: torch.cat([t[:1], t[1:] * 1.1]), 0.1),
        (1, lambda t: t * torch.nan, torch.inf),
        (1, lambda t: t[:-1], torch.inf),
    ):
        wrong = [*right]
        wrong[number] = fault(right[number])
        assert deviation(tuple(wrong), right) == pytest.approx(expected, rel=0.01)
    nothing = (value, torch.zeros(3, 2), right[2])
    assert deviation(nothing, nothing) == 0
    assert deviation((value, torch.full((3, 2), 1e-30), right[2]), nothing) == torch.inf


def test_outputs_oracle() -> None:
    ints, floats = torch.arange(4), torch.tensor([1.0, torch.inf, torch.nan, 4])
    assert_same_outputs((ints, floats), (ints, floats))
    assert_same_outputs(floats + 1e-7, floats, tolerance=lambda: torch.tensor(1e-6))
    faults = [
        ((ints.flip(0), floats), "4 of 4 differ"),
        ((ints.int(), floats), "dtype"),
        ((ints[:3], floats), "shape"),
        ((ints, floats + 1e-3), "above the tolerance"),
        ((ints, floats.nan_to_num(0, torch.inf)), "NaN in other places"),
        ((ints, floats.where(~floats.isinf(), 0)), "infinities in other places"),
        ((ints, floats.where(~floats.isinf(), -torch.inf)), "another sign"),
        (ints, "1 outputs for 2"),
    ]
    for wrong, message in faults:
        with pytest.raises(AssertionError, match=message):
            assert_same_outputs(wrong, (ints, floats))


def test_unit_roundoff_is_half_the_spacing() -> None:
    assert unit_roundoff(torch.float32) == 2**-24
    assert unit_roundoff(torch.float64) == 2**-53
    assert unit_roundoff(torch.bfloat16) == 2**-8


def test_distance_tolerance_is_met_by_float64_and_missed_by_expansion() -> None:
    x, codebook = random_codes(64, 32, 16)
    x, codebook = x + 100, codebook + 100
    nearest = torch.cdist(x.double(), codebook.double()).argmin(1)
    exact = (x.double() - codebook[nearest].double()).square().sum(1)
    allowed = tolerance(x, codebook)
    assert ((exact.float().double() - exact).abs() <= allowed).all()
    expanded = x.square().sum(1) - 2 * (x * codebook[nearest]).sum(1)
    expanded = expanded + codebook[nearest].square().sum(1)
    assert ((expanded.double() - exact).abs() > allowed).any()


def test_sample_boxes_are_what_they_say() -> None:
    boxes, scores = random_boxes(500)
    sides = boxes[:, 2:] - boxes[:, :2]
    assert sides.min() >= 3.9
    assert sides.max() <= 84.1
    assert boxes[:, :2].max() <= 600
    assert len(scores.unique()) > 490
    clustered, _ = clustered_boxes(3, 7)
    assert clustered.shape == (21, 4)


def test_timing_and_memory_see_the_work() -> None:
    def work() -> torch.Tensor:
        return torch.ones(40 << 20, dtype=torch.uint8).cumsum(0, dtype=torch.uint8)

    timing = measure(work, "cpu", budget=0.05)
    assert timing.repeats >= 1
    assert 0 < timing.minimum <= timing.median
    assert peak_memory(work, "cpu") > 30 << 20
