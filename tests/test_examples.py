"""The examples, in short."""

import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")

from examples import (
    face_margin,
    flow_density,
    glow_memory,
    nms_methods,
    pointconv_integral,
    samplers,
    vqvae_digits,
)
from fastzoo import ops


def test_training_through_the_fused_loss_follows_the_definition() -> None:
    known, _ = face_margin.identities()
    _, right = face_margin.train(face_margin.definition, known, steps=40)
    _, curve = face_margin.train(face_margin.fused(), known, steps=40)
    assert right[-1] < right[0] - 2
    assert face_margin.largest_difference(curve, right)[-1] <= face_margin.ALLOWED


def test_a_wrong_gradient_leaves_the_curve() -> None:
    def inexact(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        options = {"margin": face_margin.MARGIN, "scale": face_margin.SCALE}
        result = ops.margin_softmax_loss(x, w, y, **options, grad="insightface")
        assert isinstance(result, torch.Tensor)
        return result

    known, _ = face_margin.identities()
    _, right = face_margin.train(face_margin.definition, known, steps=5)
    _, curve = face_margin.train(inexact, known, steps=5)
    difference = face_margin.largest_difference(curve, right)
    assert difference[0] <= face_margin.ALLOWED
    assert difference[-1] > 10 * face_margin.ALLOWED


def test_verification_of_perfect_and_of_chance_embeddings() -> None:
    _, unknown = face_margin.identities()
    owner = torch.arange(face_margin.TESTED).repeat(face_margin.VIEWS)

    class Told(torch.nn.Module):
        def __init__(self, table: torch.Tensor) -> None:
            super().__init__()
            self.table = table

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.table[: len(images)]

    by_owner = torch.eye(face_margin.TESTED)[owner]
    assert face_margin.verify(Told(by_owner), unknown) == (1.0, 1.0)
    chance = torch.randn(len(owner), 64, generator=torch.Generator().manual_seed(0))
    area, found = face_margin.verify(Told(chance), unknown)
    assert abs(area - 0.5) < 0.03
    assert found < 0.03


def test_methods_differ_as_their_titles_say(tmp_path: Path) -> None:
    output = tmp_path / "nms-methods.png"
    shown = {title.split(":")[0]: count for title, count in nms_methods.draw(output).items()}
    objects = len(nms_methods.OBJECTS)
    assert shown["before"] == nms_methods.COPIES * objects
    assert shown["nms_rotated"] == objects  # the two that lie along one another among them
    assert shown["nms"] < objects
    assert shown["nms"] < shown["soft_nms"]
    assert shown["multiclass_nms"] == shown["weighted_nms"] == objects - 1
    assert output.stat().st_size > 50_000


def test_boxes_of_the_picture_hold_what_they_are_around() -> None:
    rotated, _, _ = nms_methods.detect()
    corners = nms_methods.corners_of(rotated)
    low, high = corners.amin(1), corners.amax(1)
    assert torch.allclose(nms_methods.around(rotated), torch.cat([low, high], 1), atol=1e-3)


def test_a_codebook_learns_through_the_fused_quantiser_as_through_its_definition(
    tmp_path: Path,
) -> None:
    known, unknown = vqvae_digits.digits()
    assert (len(known), len(unknown)) == (1297, 500)
    mean = vqvae_digits.mean_image_error(known, unknown)
    assert mean == pytest.approx(0.0740, abs=5e-5)
    fused, reference, fixed = (
        vqvae_digits.rebuild(vqvae_digits.train(known, steps=60, **options), unknown)
        for options in ({}, {"backend": "reference"}, {"random_codes": True})
    )
    assert fused.error == pytest.approx(reference.error, rel=0.01)
    assert fused.perplexity == pytest.approx(reference.perplexity, rel=0.02)
    assert fused.error < 0.6 * mean
    assert fixed.error > 1.3 * fused.error
    output = tmp_path / "vqvae.png"
    vqvae_digits.draw(unknown, fused, fixed, output)
    assert output.stat().st_size > 10_000


def test_a_trained_codebook_has_to_reach_its_figures() -> None:
    usage = torch.full((64,), 1 / 64)
    good = vqvae_digits.Outcome(torch.empty(0), usage, 0.004)
    fixed = dataclasses.replace(good, error=0.02)
    assert good.perplexity == pytest.approx(64)
    assert vqvae_digits.passed(good, good, fixed)
    assert not vqvae_digits.passed(good, dataclasses.replace(good, error=0.007), fixed)
    assert not vqvae_digits.passed(good, good, dataclasses.replace(fixed, error=0.01))
    few = torch.cat([torch.full((20,), 1 / 20), torch.zeros(44)])
    assert not vqvae_digits.passed(dataclasses.replace(good, usage=few), good, fixed)


def test_pointconv_with_inverse_density_is_the_convolution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pointconv_integral, "SIDE", 6)
    cloud, at = pointconv_integral.points(), pointconv_integral.centres()
    right = pointconv_integral.exact(at)
    assert torch.equal(right.float(), pointconv_integral.exact(at, 80, 80).float())
    kernel = pointconv_integral.learn(steps=600)
    density = ops.kernel_density(cloud, pointconv_integral.BANDWIDTH)
    found = {
        "with": pointconv_integral.convolve(at, cloud, density, kernel),
        "without": pointconv_integral.convolve(at, cloud, None, kernel),
    }
    errors = [pointconv_integral.mean_relative_error(values, right) for values in found.values()]
    assert pointconv_integral.passed(*errors)
    assert errors[1] > 10 * errors[0]
    output = tmp_path / "integral.png"
    pointconv_integral.draw(cloud, right, found, output)
    assert output.stat().st_size > 10_000


def test_the_exact_convolution_of_a_constant_is_the_mass_of_its_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pointconv_integral, "signal", lambda at: torch.ones_like(at[..., 0]))
    width = pointconv_integral.DEVIATION
    mass = 2 * torch.pi * width**2 * (1 - torch.tensor(-4.5).double().exp())
    found = pointconv_integral.exact(torch.zeros(1, 2))
    assert found.item() == pytest.approx(mass.item(), rel=1e-12)


def test_a_convolution_has_to_reach_its_figures() -> None:
    assert pointconv_integral.passed(0.03, 0.1)
    assert not pointconv_integral.passed(0.031, 0.2)
    assert not pointconv_integral.passed(0.01, 0.09)


@pytest.mark.parametrize("model", flow_density.MODELS)
def test_a_flow_learns_through_fused_couplings_as_through_their_definitions(
    model: str, tmp_path: Path
) -> None:
    data = flow_density.moons()
    assert [len(part) for part in (data.train, data.validation, data.test)] == [4000, 1000, 1000]
    normal = flow_density.normal_likelihood(data)
    fused, reference = (
        flow_density.train(flow_density.MODELS[model], data, steps=50, backend=backend)
        for backend in ("auto", "reference")
    )
    assert abs(fused.test - reference.test) <= 1e-3  # so few steps multiply roundings by little
    assert fused.test > normal + 0.2
    output = tmp_path / "density.png"
    flow_density.draw(data, {model: fused.flow}, output)
    assert output.stat().st_size > 10_000


def test_tumours_are_standardised_by_what_is_trained_with() -> None:
    data = flow_density.tumours()
    assert [len(part) for part in (data.train, data.validation, data.test)] == [369, 100, 100]
    assert torch.allclose(data.train.T.cov(), torch.eye(30), atol=1e-3)
    assert data.test.std(0).max() > 1.5  # and not by what is tested with


def test_densities_have_to_be_alike_and_above_a_normal() -> None:
    flow = flow_density.real_nvp(2)
    fused = flow_density.Outcome(flow, -1.5, 1.0)
    assert flow_density.passed(fused, dataclasses.replace(fused, test=-1.529), normal=-2.1)
    assert not flow_density.passed(fused, dataclasses.replace(fused, test=-1.54), normal=-2.1)
    assert not flow_density.passed(fused, fused, normal=-1.9)


def test_a_glow_stack_has_the_same_gradients_in_every_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(glow_memory, "HIDDEN", 8)
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    rows = glow_memory.measure(3, x, repeats=1)
    assert [row.way for row in rows] == list(glow_memory.WAYS)
    assert all(row.error <= 1e-4 and row.seconds > 0 for row in rows)
    output = tmp_path / "memory.png"
    assert glow_memory.draw(rows, output)
    assert output.stat().st_size > 10_000


def test_inverted_stacks_have_to_reach_their_figures() -> None:
    def rows(peak: int, error: float) -> list[glow_memory.Row]:
        shallow = glow_memory.Row(4, "stored", 10, 0.1, 0.0)
        deep = dataclasses.replace(shallow, depth=64, peak=100)
        inverted = dataclasses.replace(deep, way="inverted, no anchors", peak=peak, error=error)
        return [shallow, deep, inverted]

    assert glow_memory.passed(rows(25, 1e-4))
    assert not glow_memory.passed(rows(26, 1e-4))
    assert not glow_memory.passed(rows(25, 2e-3))


def test_samplers_come_nearer_with_more_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samplers, "STEPS", (5, 10, 50))
    monkeypatch.setattr(samplers, "ODE", {"euler": "Euler", "heun": "Heun"})
    monkeypatch.setattr(samplers, "SDE", {"euler_ancestral": "Euler ancestral"})
    problem = samplers.mixture(40)
    exact = problem.solution()
    rows = samplers.measure(problem, exact)
    assert samplers.passed(rows)
    astray = [dataclasses.replace(rows[-1], method="heun", error=1.0)]
    assert not samplers.passed(rows + astray)
    # Noise that differs leaves the solution, and not the distribution.
    noisy = rows[-1]
    assert noisy.method == "euler_ancestral"
    assert noisy.error > 1 > 3 * noisy.distance
    assert samplers.same_in_any_batch(problem, "euler_ancestral")
    output = tmp_path / "samplers.png"
    samplers.draw_points(rows, exact, output)
    assert output.stat().st_size > 10_000


def test_a_sampler_of_digits_ends_at_one_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samplers, "STEPS", (5, 20))
    monkeypatch.setattr(samplers, "ODE", {"euler": "Euler", "dpmpp_2m": "DPM++ 2M"})
    monkeypatch.setattr(samplers, "SDE", {})
    problem = samplers.digits(6)
    exact = problem.solution()
    images = torch.from_numpy(samplers.load_digits().data) / 8 - 1
    assert torch.cdist(exact, images).amin(1).max() < 1e-3
    rows = samplers.measure(problem, exact)
    assert rows[-1].distance < rows[0].distance
    output = tmp_path / "samplers.png"
    samplers.draw_digits(rows, exact, output)
    assert output.stat().st_size > 5_000
