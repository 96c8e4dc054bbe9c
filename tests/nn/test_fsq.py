"""FSQ against the published formula in Python floats, and against lucidrains' class."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastzoo.nn import FSQ

LEVELS = [8, 5, 3, 4]


def rounded(z: float, levels: int, symmetric: bool) -> tuple[float, float, int]:
    """Code, derivative and level of one dimension; ties are not among the inputs."""
    if symmetric:
        t = math.tanh(z)
        level = math.floor((levels - 1) * (t + 1) / 2 + 0.5)
        return 2 / (levels - 1) * level - 1, 1 - t * t, level
    reach = (levels - 1) * (1 + 1e-3) / 2
    offset = 0.5 if levels % 2 == 0 else 0.0
    t = math.tanh(z + math.atanh(offset / reach))
    whole, half = round(t * reach - offset), levels // 2
    return whole / half, (1 - t * t) * reach / half, whole + half


def latents(*shape: int, seed: int = 0) -> Tensor:
    """Such that every level occurs, the outermost too."""
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("levels", [[8, 5, 3, 4], [3], [7, 16], [2, 2, 9]], ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
def test_values_gradients_and_indices_are_the_formula(levels: list[int], symmetric: bool) -> None:
    if 2 in levels and not symmetric:
        pytest.skip("two levels need symmetry")
    fsq = FSQ(levels, preserve_symmetry=symmetric)
    z = latents(300, len(levels)).requires_grad_()
    codes, indices = fsq(z)
    assert indices.dtype == torch.int64
    grad = latents(*codes.shape, seed=1)
    (grad_z,) = torch.autograd.grad(codes, z, grad)
    seen: list[set[int]] = [set() for _ in levels]
    for row in range(len(z)):
        index, basis = 0, 1
        for i, count in enumerate(levels):
            value, slope, level = rounded(z[row, i].item(), count, symmetric)
            # Float64, a few roundings.
            assert codes[row, i].item() == pytest.approx(value, rel=1e-14, abs=1e-15)
            wanted = slope * grad[row, i].item()
            assert grad_z[row, i].item() == pytest.approx(wanted, rel=1e-9, abs=1e-14)
            index, basis = index + level * basis, basis * count
            seen[i].add(level)
        assert indices[row].item() == index
    assert seen == [set(range(count)) for count in levels]


@pytest.mark.parametrize("symmetric", [False, True])
def test_indices_and_codes_are_each_others_inverse(symmetric: bool) -> None:
    fsq = FSQ(LEVELS, preserve_symmetry=symmetric)
    every = torch.arange(fsq.codebook_size)
    codes = fsq.indices_to_codes(every)
    assert fsq.codebook_size == len(codes.unique(dim=0)) == 480
    assert torch.equal(fsq.codes_to_indices(codes), every)
    assert torch.equal(fsq.codes_to_indices(codes.bfloat16()), every)
    assert torch.equal(fsq.implicit_codebook, codes)
    assert fsq.indices_to_level_indices(torch.tensor(1 + 8 * 3 + 40 * 2 + 120)).tolist() == [
        1, 3, 2, 1,
    ]  # fmt: skip
    quantized, indices = fsq(latents(50, 4).float())
    assert torch.equal(fsq.indices_to_codes(indices), quantized)
    assert torch.equal(fsq.codes_to_indices(quantized), indices)


def test_more_codes_than_float32_counts() -> None:
    fsq = FSQ([8] * 20)
    z = latents(30, 20).float()
    codes, indices = fsq(z)
    for row, index in zip(codes, indices.tolist(), strict=True):
        levels = [round(v * 4) + 4 for v in row.tolist()]
        assert index == sum(level * 8**i for i, level in enumerate(levels))
    assert torch.equal(fsq.codes_to_indices(codes), indices)
    assert torch.equal(fsq.indices_to_codes(indices), codes)


@pytest.mark.parametrize(
    ("options", "shape", "indices_shape"),
    [
        ({}, (7, 4), (7,)),
        ({}, (4,), ()),
        ({}, (2, 3, 4), (2, 3)),
        ({}, (2, 4, 3, 5), (2, 3, 5)),
        ({}, (2, 4, 3, 5, 6), (2, 3, 5, 6)),
        ({}, (0, 3, 4), (0, 3)),
        ({"channel_first": True}, (2, 4, 3), (2, 3)),
        ({"keep_num_codebooks_dim": True}, (2, 3, 4), (2, 3, 1)),
        ({"num_codebooks": 3}, (2, 5, 12), (2, 5, 3)),
        ({"num_codebooks": 3, "channel_first": True}, (2, 12, 5), (2, 5, 3)),
        ({"num_codebooks": 2, "dim": 6}, (2, 6, 5, 3), (2, 5, 3, 2)),
    ],
)
def test_layouts(
    options: dict[str, Any], shape: tuple[int, ...], indices_shape: tuple[int, ...]
) -> None:
    fsq = FSQ(LEVELS, **options)
    z = latents(*shape).float()
    quantized, indices = fsq(z)
    assert (quantized.shape, quantized.dtype) == (z.shape, z.dtype)
    assert indices.shape == indices_shape
    torch.testing.assert_close(fsq.indices_to_codes(indices), quantized)
    if "dim" not in options:
        # Layouts are the same vectors in other places.
        second = len(shape) >= 4 or "channel_first" in options
        rows = z.movedim(1, -1) if second else z
        plain = FSQ(LEVELS)(rows.reshape(-1, 4))[1]
        assert torch.equal(plain, indices.flatten())


CASES: list[dict[str, Any]] = [
    {"levels": [8, 5, 5, 5]},
    {"levels": (8, 5, 2), "preserve_symmetry": True},
    {"levels": [8, 5], "dim": 7, "num_codebooks": 3},
    {"levels": [4, 5], "dim": 6, "projection_has_bias": False, "channel_first": True},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_agrees_with_lucidrains(options: dict[str, Any]) -> None:
    peer = pytest.importorskip("vector_quantize_pytorch")
    theirs, ours = peer.FSQ(**options), FSQ(**options)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = latents(2, ours.dim, ours.dim).float().requires_grad_()
    expected, indices = theirs(x)
    quantized, found = ours(x)
    # Float32; they take other ways to the same multiple of the step.
    torch.testing.assert_close(quantized, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(found, indices.long())
    torch.testing.assert_close(
        ours.indices_to_codes(found), theirs.indices_to_codes(indices), rtol=1e-6, atol=1e-6
    )
    grad = torch.randn_like(expected)
    for mine, right in zip(
        torch.autograd.grad(quantized, [x, *ours.parameters()], grad),
        torch.autograd.grad(expected, [x, *theirs.parameters()], grad),
        strict=True,
    ):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_quantised_in_float32(dtype: torch.dtype) -> None:
    z = latents(100, 4).to(dtype)
    quantized, indices = FSQ(LEVELS)(z)
    expected, right = FSQ(LEVELS)(z.float())
    assert torch.equal(quantized, expected.to(dtype))
    assert torch.equal(indices, right)


def test_autocast() -> None:
    fsq = FSQ(LEVELS, dim=6)
    z = latents(100, 6).float()
    with torch.autocast("cpu", torch.bfloat16):
        quantized, indices = fsq(z)
        projected = fsq.project_in(z)
    assert torch.equal(indices, FSQ(LEVELS)(projected)[1])
    assert quantized.dtype == torch.bfloat16


def test_nan_and_infinite() -> None:
    z = torch.tensor([[torch.nan, 0.0], [torch.inf, -torch.inf]])
    quantized, indices = FSQ([5, 5])(z)
    assert quantized[0].isnan().tolist() == [True, False]
    assert quantized[0, 1] == 0
    assert indices.tolist() == [0 + 5 * 2, 4 + 5 * 0]


def test_without_indices() -> None:
    fsq = FSQ(LEVELS, return_indices=False)
    z = latents(3, 4)
    assert fsq(z)[1] is None
    assert torch.equal(fsq(z)[0], FSQ(LEVELS)(z)[0])


def test_fullgraph_compile() -> None:
    for options in ({}, {"preserve_symmetry": True, "num_codebooks": 2, "dim": 5}):
        fsq = FSQ(LEVELS, **options)  # type: ignore[arg-type]
        z = latents(6, fsq.dim).float()
        compiled = torch.compile(fsq, fullgraph=True, backend="aot_eager")
        for found, expected in zip(compiled(z), fsq(z), strict=True):
            assert torch.equal(found, expected)


def test_repr_and_double() -> None:
    assert "levels=(8, 5, 3, 4), dim=6" in repr(FSQ(LEVELS, dim=6))
    fsq = FSQ(LEVELS, dim=6).double()
    quantized, indices = fsq(latents(5, 6))
    torch.testing.assert_close(fsq.indices_to_codes(indices), quantized, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": []}, "levels"),
        ({"levels": [5, 2]}, "levels.*at least 3"),
        ({"levels": [5, 1], "preserve_symmetry": True}, "levels.*at least 2"),
        ({"levels": [8] * 21}, "2\\^63"),
        ({"levels": LEVELS, "dim": 0}, "dim"),
        ({"levels": LEVELS, "num_codebooks": 0}, "num_codebooks"),
        (
            {"levels": LEVELS, "num_codebooks": 2, "keep_num_codebooks_dim": False},
            "keep_num_codebooks_dim",
        ),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FSQ(**options)


def test_bad_tensors() -> None:
    fsq = FSQ(LEVELS, num_codebooks=2)
    with pytest.raises(TypeError, match="noise_dropout"):
        FSQ(LEVELS, noise_dropout=0.5)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"z: expected \[..., D\], D = 8, got \[2, 3, 4\]"):
        fsq(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"z: expected \[B, D, ...\]"):
        fsq(torch.zeros(2, 4, 3, 8))
    with pytest.raises(TypeError, match="z"):
        fsq(torch.zeros(2, 8, dtype=torch.int64))
    with pytest.raises(TypeError, match="indices"):
        fsq.indices_to_codes(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="indices"):
        fsq.indices_to_codes(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="codes"):
        fsq.codes_to_indices(torch.zeros(2, 3))
