"""fastzoo.compat.k_diffusion beside k-diffusion itself, in float64 from one seed: what the methods
compute is held to it in tests/samplers/test_methods.py, here what is theirs beside that."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from fastzoo.compat import k_diffusion as ours
from tests.samplers.peers import k_diffusion_sampling

theirs = k_diffusion_sampling()

SAMPLERS = [name for name in ours.__all__ if name.startswith("sample_")]
# Their default is a Brownian tree.
BY_TREE = ("sample_dpmpp_sde", "sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde")


def denoiser(x: Tensor, sigma: Tensor, shift: float = 0.0) -> Tensor:
    return x / (1 + sigma[:, None] ** 2) + shift


@pytest.mark.parametrize("name", ours.__all__)
def test_arguments_are_theirs(name: str) -> None:
    found, right = (inspect.signature(getattr(m, name)).parameters for m in (ours, theirs))
    assert {k: p.default for k, p in found.items()} == {k: p.default for k, p in right.items()}
    assert list(found) == list(right)


def increments(sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """Of one path, as those of a Brownian tree are."""
    steps = torch.arange(1, 11, dtype=torch.float64).view(2, 5)
    ends = (steps * sigma.sqrt()).sin() - (steps * next_sigma.sqrt()).sin()
    return ends / (sigma - next_sigma).sqrt()


@pytest.mark.parametrize("name", SAMPLERS)
def test_runs_are_theirs(name: str) -> None:
    """From torch's global generator, with the model's arguments and a callback."""
    generator = torch.Generator().manual_seed(0)
    x = 15 * torch.randn(2, 5, generator=generator, dtype=torch.float64)
    sigmas = ours.get_sigmas_karras(6, 0.05, 15).double()
    runs = []
    for module in (ours, theirs):
        torch.manual_seed(2)
        seen: list[dict[str, Any]] = []
        options: dict[str, Any] = {}
        if name in BY_TREE:
            options = {"noise_sampler": increments, "eta": 0.5}
        if "s_churn" in inspect.signature(getattr(ours, name)).parameters:
            options = {"s_churn": 2.0}
        function = getattr(module, name)
        out = function(denoiser, x, sigmas, {"shift": 0.3}, seen.append, True, **options)
        runs.append((out, seen))
    (found, saw), (right, should) = runs
    torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10)
    assert [set(info) for info in saw] == [set(info) for info in should]
    for info, other in zip(saw, should, strict=True):
        for key, value in other.items():
            torch.testing.assert_close(info[key], value, rtol=1e-10, atol=1e-10)


def test_sigmas_are_theirs() -> None:
    for name, arguments in (
        ("get_sigmas_karras", (9, 0.02, 20.0)),
        ("get_sigmas_exponential", (9, 0.02, 20.0)),
        ("get_sigmas_polyexponential", (9, 0.02, 20.0, 1.5)),
        ("get_sigmas_vp", (9,)),
    ):
        found, right = (getattr(m, name)(*arguments) for m in (ours, theirs))
        assert (found.dtype, found.device) == (right.dtype, right.device)
        # exp(...) - 1 in float32 has lost a few digits where that is small, theirs for vp.
        torch.testing.assert_close(found, right, rtol=1e-3 if name.endswith("vp") else 1e-5, atol=0)
