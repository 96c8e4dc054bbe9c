"""The sampling loop."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from fastzoo import ops
from fastzoo.samplers.algebra import Coefficient, Tables
from fastzoo.samplers.plan import Compute, Draw, Evaluate, Instruction, Report, Trace

Seeds = int | Sequence[int] | Tensor


class Sampler:
    """A sampler whose coefficients are made once: calling it runs the loop.

    Args:
        sigmas: ``[n + 1]`` noise levels, descending, or ``[n + 1, B]`` with a schedule for each
            sample; a tensor or a sequence. See :mod:`fastzoo.samplers.schedules`.
        method: its name; ``docs/samplers/methods.md`` has the table.
        prediction: what the model returns: ``denoised`` (k-diffusion's denoiser), ``epsilon``,
            ``v``, ``score``, ``F`` (Karras et al.), or ``velocity``, of a rectified flow whose time
            the sigmas are.
        sigma_data: of ``F``.
        guidance_scale: classifier-free guidance: the model then returns (uncond, cond), or both as
            one tensor of a doubled batch, uncond first. A number, or one a sample.
        guidance_rescale: how much of the conditional prediction's spread guidance keeps, 0 to 1.
        options: of the method, e.g. ``s_churn`` of ``heun`` and ``eta`` of the ancestral ones.

    The coefficients are float64 on the host, and go to the device of x at its first call there: a
    loop has no other transfer and waits for nothing, so that after one call it can be captured in a
    CUDA graph, if the model can (with ``seeds``, since a generator's noise is drawn anew).
    """

    def __init__(
        self,
        sigmas: Tensor | Sequence[float],
        method: str = "euler",
        *,
        prediction: str = "denoised",
        sigma_data: float = 0.5,
        guidance_scale: float | Sequence[float] | Tensor | None = None,
        guidance_rescale: float = 0.0,
        **options: Any,
    ) -> None:
        self.sigmas = _levels(sigmas)
        self.guidance_rescale = float(guidance_rescale)
        self.guidance_scale: Coefficient | None = None
        if guidance_scale is not None:
            scale = _array(guidance_scale)
            self.guidance_scale = float(scale) if scale.ndim == 0 else scale
        elif guidance_rescale:
            raise ValueError("guidance_rescale: expected with guidance_scale")
        self._arguments: dict[str, Any] = {
            "method": method,
            "options": options,
            "prediction": prediction,
            "sigma_data": sigma_data,
            "guidance_scale": self.guidance_scale,
            "rescaled": self.guidance_rescale != 0,
        }
        self._runs: dict[tuple[bool, bool], _Run] = {}
        # What the arguments have wrong is said here, not at the first call.
        self._run(counter=True, reports=False)

    def _run(self, *, counter: bool, reports: bool) -> "_Run":
        key = (counter, reports)
        if key not in self._runs:
            levels = [level if level.ndim else float(level) for level in self.sigmas]
            self._runs[key] = _Run(
                Trace(sigmas=levels, counter=counter, reports=reports, **self._arguments)
            )
        return self._runs[key]

    def __call__(
        self,
        model: Callable[..., Any],
        x: Tensor,
        *,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], Any] | None = None,
        noise_sampler: Callable[[Any, Any], Tensor] | None = None,
        generator: torch.Generator | None = None,
        seeds: Seeds | None = None,
        progress: bool = False,
        differentiable: bool = False,
        stochastic_rounding: bool = False,
    ) -> Tensor:
        """:func:`sample` with this sampler's settings."""
        _check_state(x, self.sigmas, self.guidance_scale)
        if (noise_sampler is not None) + (generator is not None) + (seeds is not None) > 1:
            raise ValueError("noise_sampler, generator, seeds: expected at most one")
        if stochastic_rounding and seeds is None:
            raise ValueError("seeds: expected with stochastic_rounding")
        keys = None if seeds is None else ops.counter_keys(seeds, x.shape[0], x.device)
        run = self._run(counter=seeds is not None, reports=callback is not None)
        if noise_sampler is None:

            def noise_sampler(sigma: Any, next_sigma: Any) -> Tensor:
                return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)

        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            return run(
                model,
                x,
                extra_args or {},
                callback,
                noise_sampler,
                keys,
                self.guidance_scale,
                self.guidance_rescale,
                progress,
                stochastic_rounding,
            )


def sample(
    model: Callable[..., Any],
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    method: str = "euler",
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    noise_sampler: Callable[[Any, Any], Tensor] | None = None,
    progress: bool = False,
    *,
    generator: torch.Generator | None = None,
    seeds: Seeds | None = None,
    differentiable: bool = False,
    stochastic_rounding: bool = False,
    **settings: Any,
) -> Tensor:
    """Samples from a diffusion model or rectified flow, one kernel a step beside the model.

    Args:
        model: ``model(x, sigma, **extra_args)`` with sigma ``[B]``, as k-diffusion's denoisers
            are; what it returns is ``prediction``.
        x: ``[B, ...]`` noise of the first sigma's size, e.g. ``sigmas[0] * noise(shape, seeds)``.
        sigmas: the noise levels, descending; see :class:`Sampler`.
        method: ``euler``, ``heun``, ``dpmpp_2m`` and so on; ``docs/samplers/methods.md``.
        extra_args: keyword arguments of the model.
        callback: called after a step's first evaluation with a dict of ``x``, ``i``, ``sigma``,
            ``sigma_hat`` and ``denoised``. It costs the kernels that make these.
        noise_sampler: ``noise_sampler(sigma, next_sigma) -> noise`` like x.
        progress: shows a bar, by tqdm.
        generator: of the noise, drawn as torch.randn; by default torch's global one.
        seeds: noise by counter instead: an int, or one a sample: the same sample whatever batch,
            device or backend it is drawn in.
        differentiable: keeps the graph, so that gradients go through the whole run.
        stochastic_rounding: a float16 or bfloat16 state is rounded up or down by chance, each as
            likely as it is near, so that small steps are not lost. Takes seeds.
        settings: ``prediction``, ``guidance_scale``, ``guidance_rescale``, ``sigma_data`` of
            :class:`Sampler`, and the method's own options.

    Returns:
        The state at the last sigma, like x.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.

    Source: Karras et al., Elucidating the design space of diffusion-based generative models (2022);
    each method's own in ``docs/samplers/methods.md``.
    """
    return Sampler(sigmas, method, **settings)(
        model,
        x,
        extra_args=extra_args,
        callback=callback,
        noise_sampler=noise_sampler,
        generator=generator,
        seeds=seeds,
        progress=progress,
        differentiable=differentiable,
        stochastic_rounding=stochastic_rounding,
    )


def noise(
    shape: Sequence[int],
    seeds: Seeds,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    draw: int = 0,
) -> Tensor:
    """Standard normal noise by counter ``[B, ...]``: the latents that a run begins with.

    Args:
        shape: B first.
        seeds: an int, or one a sample, as :func:`sample` takes them; a sample's noise does not
            depend on the batch, the device or the backend, to the last bit in float32.
        draw: 0 is what runs begin with; their steps draw 1 and on.
    """
    keys = ops.counter_keys(seeds, shape[0], device)
    n = int(numpy.prod(shape[1:], dtype=numpy.int64))
    return ops.counter_normal(keys, n, draw).view(*shape).to(dtype)


class _Run:
    """The instructions of a trace, bound to a model and a state."""

    def __init__(self, trace: Trace) -> None:
        self._instructions = trace.instructions
        self._result = trace.result
        self._tables = Tables([i.program for i in self._instructions if isinstance(i, Compute)])
        self._levels = [i.sigma for i in self._instructions if isinstance(i, Evaluate)]
        self._dead = _last_uses(self._instructions, self._result)
        self._sigmas_on: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}

    def _sigmas(self, x: Tensor) -> Tensor:
        """``[evaluations, B]``, on the device of x since the first run there."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        key = (x.device, dtype, x.shape[0])
        if key not in self._sigmas_on:
            rows = [numpy.broadcast_to(level, x.shape[:1]) for level in self._levels]
            stacked = torch.from_numpy(numpy.array(rows, dtype=numpy.float64).reshape(-1, len(x)))
            self._sigmas_on[key] = stacked.to(x.device, dtype)
        return self._sigmas_on[key]

    def __call__(
        self,
        model: Callable[..., Any],
        x: Tensor,
        extra_args: Mapping[str, Any],
        callback: Callable[[dict[str, Any]], Any] | None,
        noise_sampler: Callable[[Any, Any], Tensor],
        keys: Tensor | None,
        guidance_scale: Coefficient | None,
        guidance_rescale: float,
        progress: bool,
        stochastic: bool,
    ) -> Tensor:
        tables = iter(self._tables.on(x.device))
        sigmas = iter(self._sigmas(x))
        tensors = {"x": x}
        factors: dict[str, Tensor] = {}
        scale: Any = guidance_scale
        if isinstance(scale, numpy.ndarray):
            scale = torch.from_numpy(scale).to(x.device)
        instructions = _with_progress(self._instructions, progress, len(self._levels))
        for instruction, dead in zip(instructions, self._dead, strict=True):
            if isinstance(instruction, Evaluate):
                predicted = model(tensors[instruction.x], next(sigmas), **extra_args)
                if len(instruction.outputs) == 1:
                    tensors[instruction.outputs[0]] = _like(x, predicted)
                else:
                    uncond, cond = (_like(x, p) for p in _pair(predicted, x))
                    tensors.update(zip(instruction.outputs, (uncond, cond), strict=True))
                    if guidance_rescale:
                        name = instruction.outputs[0].removesuffix("-uncond")
                        factors[name] = ops.guidance_factor(cond, uncond, scale, guidance_rescale)
            elif isinstance(instruction, Compute):
                by = instruction.scaled_by
                results = instruction.program(
                    tensors,
                    next(tables),
                    seeds=keys if instruction.program.noisy or stochastic else None,
                    stochastic=stochastic,
                    factor=factors.pop(by) if by else None,
                )
                found = results if isinstance(results, tuple) else (results,)
                tensors.update(zip(instruction.results, found, strict=True))
            elif isinstance(instruction, Draw):
                drawn = noise_sampler(instruction.sigma, instruction.next_sigma)
                tensors[instruction.name] = _like(x, drawn)
            elif callback is not None:
                callback(
                    {
                        "x": tensors[instruction.x],
                        "i": instruction.index,
                        "sigma": instruction.sigma,
                        "sigma_hat": instruction.sigma_hat,
                        "denoised": tensors[instruction.denoised],
                    }
                )
            for name in dead:
                del tensors[name]
        return tensors[self._result].to(x.dtype)


def _uses(instruction: Instruction) -> tuple[str, ...]:
    if isinstance(instruction, Evaluate):
        return (instruction.x, *instruction.outputs)
    if isinstance(instruction, Compute):
        return (*instruction.program.inputs, *instruction.results)
    if isinstance(instruction, Report):
        return instruction.x, instruction.denoised
    return (instruction.name,)


def _last_uses(instructions: Sequence[Instruction], result: str) -> list[list[str]]:
    """The tensors that nothing needs after each instruction."""
    seen, dead = {result}, list[list[str]]()
    for instruction in reversed(instructions):
        names = dict.fromkeys(_uses(instruction))
        dead.append([name for name in names if name not in seen])
        seen.update(names)
    return dead[::-1]


def _with_progress(instructions: Sequence[Instruction], progress: bool, evaluations: int) -> Any:
    if not progress:
        return instructions
    from tqdm.auto import tqdm

    def counted() -> Any:
        with tqdm(total=evaluations) as bar:
            for instruction in instructions:
                yield instruction
                bar.update(isinstance(instruction, Evaluate))

    return counted()


def _pair(predicted: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(predicted, tuple | list) and len(predicted) == 2:
        return predicted[0], predicted[1]
    if isinstance(predicted, Tensor) and predicted.shape[:1] == (2 * x.shape[0],):
        uncond, cond = predicted.chunk(2)
        return uncond, cond
    raise ValueError(
        f"model: expected (uncond, cond) or both as a batch of {2 * x.shape[0]}, for guidance"
    )


def _like(x: Tensor, value: object) -> Tensor:
    """Of the shape of x; only float64 goes with float64."""
    if not isinstance(value, Tensor):
        raise TypeError(f"model: expected a tensor {list(x.shape)}, got {type(value).__name__}")
    if value.shape != x.shape:
        raise ValueError(f"model: expected {list(x.shape)}, got {list(value.shape)}")
    return value.to(x.dtype) if torch.float64 in (x.dtype, value.dtype) else value


def _array(value: Any) -> numpy.ndarray[Any, numpy.dtype[numpy.float64]]:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    return numpy.asarray(value, dtype=numpy.float64)


def _levels(sigmas: Tensor | Sequence[float]) -> numpy.ndarray[Any, numpy.dtype[numpy.float64]]:
    levels = _array(sigmas)
    if levels.ndim not in (1, 2) or len(levels) < 2:
        raise ValueError(f"sigmas: expected [n + 1] or [n + 1, B], got {list(levels.shape)}")
    if not numpy.isfinite(levels).all() or (levels < 0).any() or (levels[:-1] == 0).any():
        raise ValueError("sigmas: expected above 0, but for the last, and finite")
    if (levels[1:] >= levels[:-1]).any():
        raise ValueError("sigmas: expected descending")
    if levels.ndim == 2 and (levels[-1] == 0).any() and not (levels[-1] == 0).all():
        raise ValueError("sigmas: expected to end at 0 for all samples or for none")
    return levels


def _check_state(
    x: object,
    sigmas: numpy.ndarray[Any, numpy.dtype[numpy.float64]],
    guidance_scale: Coefficient | None,
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor [B, ...], got {type(x).__name__}")
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"x: expected floating [B, ...], got {x.dtype} {list(x.shape)}")
    batch = x.shape[0]
    if sigmas.ndim == 2 and sigmas.shape[1] != batch:
        raise ValueError(f"sigmas: expected [n + 1, {batch}], got {list(sigmas.shape)}")
    if isinstance(guidance_scale, numpy.ndarray) and guidance_scale.shape != (batch,):
        raise ValueError(f"guidance_scale: expected [{batch}], got {list(guidance_scale.shape)}")
