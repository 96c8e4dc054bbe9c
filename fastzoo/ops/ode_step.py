"""Steps of samplers and ODE solvers: a weighted sum of tensors and noise, in one pass."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastzoo import reference
from fastzoo.ops._checks import check_count, check_floating, check_same, check_tensor
from fastzoo.ops._operator import Operator
from fastzoo.reference.ode_step import BOUND as BOUND
from fastzoo.reference.ode_step import DRAW as DRAW
from fastzoo.reference.ode_step import EARLIER as EARLIER
from fastzoo.reference.ode_step import NOISE as NOISE
from fastzoo.reference.ode_step import ROWS as ROWS
from fastzoo.reference.ode_step import TENSORS as TENSORS
from fastzoo.reference.ode_step import WIDTH as WIDTH
from fastzoo.reference.ode_step import given
from fastzoo.reference.precision import compute_dtype

Seeds: TypeAlias = int | Sequence[int] | Tensor

_TENSOR_ARGUMENTS = ", ".join(f"Tensor t{k}" for k in range(TENSORS))


def _fake_ode_step(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    t0, table, keep = args[0], args[TENSORS], args[TENSORS + 6]
    rows = table.shape[2]
    kept = [
        t0.new_empty(t0.shape if keep >> r & 1 and r < rows - 1 else (0,)) for r in range(ROWS - 1)
    ]
    return t0.new_empty(t0.shape), kept[0], kept[1]


def _setup_ode_step(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors, (table, step, factor, threshold) = inputs[:TENSORS], inputs[TENSORS : TENSORS + 4]
    ctx.dtypes = [t.dtype for t in given(tensors)]
    ctx.scaled = inputs[TENSORS + 5]
    needed = given(tensors) if table.shape[2] > 1 or factor.requires_grad else ()
    ctx.save_for_backward(table, step, factor, threshold, *needed)


def _backward_ode_step(ctx: Any, grad_out: Tensor, *grad_kept: Tensor) -> tuple[Any, ...]:
    table, step, factor, threshold, *tensors = ctx.saved_tensors
    wants_factor = ctx.needs_input_grad[TENSORS + 2] and factor.numel() > 0
    grads, of_factor = reference.ode_step_backward(
        grad_out,
        grad_kept,
        tensors,
        ctx.dtypes,
        table,
        step,
        factor,
        threshold,
        ctx.scaled,
        wants_factor,
    )
    absent = (None,) * (TENSORS - len(grads))
    return *grads, *absent, None, None, of_factor, *(None,) * 5


_ODE_STEP = Operator(
    f"ode_step({_TENSOR_ARGUMENTS}, Tensor table, Tensor step, Tensor factor, Tensor threshold,"
    " Tensor keys, SymInt scaled, SymInt keep, bool stochastic) -> (Tensor, Tensor, Tensor)",
    reference=reference.ode_step_rows,
    fake=_fake_ode_step,
    triton="ode_step.ode_step",
    setup_context=_setup_ode_step,
    backward=_backward_ode_step,
    autocast=torch.float32,
)

_COUNTER_BITS = Operator(
    "counter_bits(Tensor keys, SymInt n, SymInt draw) -> Tensor",
    reference=reference.counter_bits,
    fake=lambda keys, n, draw: keys.new_empty((keys.shape[0], n)),
    triton="ode_step.counter_bits",
)

_COUNTER_NORMAL = Operator(
    "counter_normal(Tensor keys, SymInt n, SymInt draw) -> Tensor",
    reference=reference.counter_normals,
    fake=lambda keys, n, draw: keys.new_empty((keys.shape[0], n), dtype=torch.float32),
    triton="ode_step.counter_normal",
)

_GUIDANCE_FACTOR = Operator(
    "guidance_factor(Tensor cond, Tensor uncond, Tensor guidance, float rescale) -> Tensor",
    reference=reference.guidance_factor,
    fake=lambda cond, *_: cond.new_empty(cond.shape[0], dtype=compute_dtype(cond)),
    has=("reference", "cpu", "cuda"),
    differentiable_reference=True,
    autocast=torch.float32,
)

_STEP_ERROR = Operator(
    f"step_error({_TENSOR_ARGUMENTS}, Tensor weights, Tensor factor, float rtol, float atol)"
    " -> Tensor",
    reference=reference.step_error,
    fake=lambda t0, *_: t0.new_empty(t0.shape[0], dtype=torch.float64),
    has=("reference", "cpu", "cuda"),
    differentiable_reference=True,
    autocast=torch.float32,
)


def ode_step(
    tensors: Sequence[Tensor],
    table: Tensor,
    *,
    step: Tensor | None = None,
    factor: Tensor | None = None,
    scaled: Sequence[int] = (),
    threshold: Tensor | None = None,
    seeds: Seeds | None = None,
    keep: Sequence[int] = (),
    stochastic: bool = False,
    backend: str | None = None,
) -> Any:
    """A step of any linear sampler or Runge-Kutta method: up to three weighted sums of up to eight
    tensors, and noise, in one pass over them.

    What a step of which method weighs is the matter of :mod:`fastzoo.samplers`; this is the kernel
    under all of them. The value of row r is ``clamp(sum_k w_k f_k t_k + sum_{j<r} w_{8+j} v_j +
    w_10 z, -w_12, w_12)``.

    Args:
        tensors: one to eight, ``[B, ...]`` of one shape: float32, float16 and bfloat16 in any mix,
            or all float64. A sample is an entry of dimension 0.
        table: float64 ``[S, Q, R, 13]``: for each step of a run, one row of samples (Q = 1) or one
            for each (Q = B), and 1 to 3 rows of weights: eight of the tensors, two of the values of
            the rows before, that of the noise, the number of the noise's draw (below 2^31), and the
            bound (infinite for none). Noise is of the last row, bounds of those before it. A weight
            of 0 ignores its tensor whatever it holds.
        step: int64 ``[1]`` on the tensors' device: which of the S is taken. It is read by the
            kernel, so that one captured step serves a whole run. None takes the first.
        factor: ``[1]`` or ``[B]``, which multiplies the weights of the tensors ``scaled``: the
            length of a step, a guidance's rescaling.
        scaled: positions among the tensors.
        threshold: ``[B]``: row 0 is clamped to plus and minus it and divided by it, in place of its
            bound.
        seeds: of the counter noise: an int (sample b is keyed by it and b), B ints (one a sample,
            wherever it stands), or int64 ``[B, 2]``: seed and sample; see :func:`counter_normal`.
        keep: of rows 0 and 1, those whose values are returned.
        stochastic: the last row is rounded to float16 or bfloat16 up or down, each as likely as it
            is near, by the counter's words, so that a state in low precision does not drift. Takes
            seeds.
        backend: ``auto``, ``reference``, ``cpu``, ``cuda`` or ``triton``; None follows
            :func:`fastzoo.use_backend`.

    Returns:
        The last row's value, of the first tensor's shape and dtype; with ``keep`` a tuple of it and
        the rows kept. Computed in float32 (float64 for float64) and rounded once; a row used by
        another is not rounded in between.

    Gradient: to the tensors and the factor, of any order; the table, thresholds and noise are
    constants. Forward-mode derivatives raise. Deterministic, and a sample's bits do not depend on
    the batch it is in. Under autocast it computes and returns float32.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.
        RuntimeError: a forced backend that cannot run, with the reason.

    Source: the samplers' papers, in ``fastzoo/samplers/formulas.py``; stochastic rounding: Croci et
    al. 2022.
    """
    if not isinstance(tensors, Sequence) or not 1 <= len(tensors) <= TENSORS:
        raise ValueError(f"tensors: expected a sequence of 1 to {TENSORS} tensors")
    first = tensors[0]
    _check_tensors(tensors)
    device = first.device
    rows = _check_table(table, first)
    none, nowhere = first.new_empty(0), torch.empty(0, dtype=torch.int64, device=device)
    if step is None:
        step = nowhere
    elif not isinstance(step, Tensor) or step.dtype != torch.int64 or step.shape != (1,):
        raise ValueError("step: expected an int64 tensor of one element")
    if stochastic and seeds is None:
        raise ValueError("seeds: expected with stochastic rounding")
    out, *kept = _ODE_STEP.launcher(backend, device.type)(
        tensors if factor is None else [*tensors, factor],
        *tensors,
        *(none,) * (TENSORS - len(tensors)),
        table,
        step,
        none if factor is None else _check_each("factor", factor, first, single=True),
        none if threshold is None else _check_each("threshold", threshold, first),
        nowhere if seeds is None else counter_keys(seeds, first.shape[0], device),
        _bits("scaled", scaled, len(tensors)),
        _bits("keep", keep, rows - 1),
        stochastic,
    )
    return (out, *(kept[r] for r in keep)) if keep else out


def counter_keys(seeds: Seeds, batch: int, device: torch.device | str | None = None) -> Tensor:
    """int64 ``[B, 2]``, (seed, sample) of each of ``batch`` samples: what operators with counter
    noise take.

    Args:
        seeds: an int: sample b is ``(seeds, b)``. B ints, or a tensor of them: sample b is
            ``(seeds[b], 0)``, the same noise in any batch. int64 ``[B, 2]``: as it is.
        batch: B.
        device: where the keys are wanted.
    """
    if isinstance(seeds, Tensor):
        if seeds.dtype != torch.int64 or seeds.shape not in ((batch,), (batch, 2)):
            raise ValueError(
                f"seeds: expected int64 [{batch}] or [{batch}, 2], got {seeds.dtype} "
                f"{list(seeds.shape)}"
            )
        moved = seeds if device is None else seeds.to(device)
        return moved if moved.dim() == 2 else torch.stack([moved, torch.zeros_like(moved)], 1)
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        pairs = [(seeds, b) for b in range(batch)]
    elif isinstance(seeds, Sequence) and all(
        isinstance(s, int) and not isinstance(s, bool) for s in seeds
    ):
        if len(seeds) != batch:
            raise ValueError(f"seeds: expected {batch}, got {len(seeds)}")
        pairs = [(s, 0) for s in seeds]
    else:
        raise TypeError(f"seeds: expected an int, ints or a tensor, got {type(seeds).__name__}")
    if any(not -(1 << 63) <= seed < 1 << 63 for seed, _ in pairs):
        raise ValueError("seeds: expected integers of 64 bits")
    return torch.tensor(pairs, dtype=torch.int64, device=device).view(batch, 2)


def counter_bits(keys: Tensor, n: int, draw: int = 0, *, backend: str | None = None) -> Tensor:
    """Random words by counter: ``[B, n]`` int64 in [0, 2^32), the same on every backend.

    Args:
        keys: int64 ``[B, 2]``, seed and sample; see :func:`counter_keys`.
        n: elements of a sample.
        draw: which draw, 0 to 2^31 - 1; the draws of a sample are independent.

    Element e is word ``e % 4`` of Philox4x32-10 with key ``seed`` and counter ``(e / 4, draw,
    sample)``. No gradient. Deterministic.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
    """
    _check_counter(keys, n, draw)
    result: Tensor = _COUNTER_BITS.choose(backend, keys.device.type)(keys, n, draw)
    return result


def counter_normal(keys: Tensor, n: int, draw: int = 0, *, backend: str | None = None) -> Tensor:
    """Standard normal noise by counter: ``[B, n]`` float32, the same bits on every backend, in any
    batch, shard or launch.

    Args:
        keys, n, draw: as :func:`counter_bits` takes them.

    Two words make two normals, by Box and Muller's formula in float32; they are within 4 units in
    the last place of its exact value, and at most 6.8 in size. No gradient. Deterministic.

    Source: Box & Muller 1958; the polynomials of Cephes (Moshier).
    """
    _check_counter(keys, n, draw)
    result: Tensor = _COUNTER_NORMAL.choose(backend, keys.device.type)(keys, n, draw)
    return result


def guidance_factor(
    cond: Tensor,
    uncond: Tensor,
    guidance_scale: float | Tensor,
    guidance_rescale: float,
    *,
    backend: str | None = None,
) -> Tensor:
    """By what classifier-free guidance is multiplied so that it keeps the conditional prediction's
    spread: ``rescale std(cond) / std(guided) + 1 - rescale`` of each sample.

    Args:
        cond, uncond: ``[B, ...]``, the model's two predictions.
        guidance_scale: s of ``guided = uncond + s (cond - uncond)``, or float64 ``[B]``.
        guidance_rescale: 0 (which gives 1) to 1.

    Returns:
        ``[B]`` float32 (float64 for float64): the ``factor`` of :func:`ode_step`. The spreads are
        standard deviations over a sample's elements, with n - 1 in the denominator.

    Gradient: of the definition. Deterministic.

    Source: Lin et al., Common diffusion noise schedules and sample steps are flawed (2023), eq. 16.
    """
    check_tensor("cond", cond, "[B, ...]", -1)
    check_floating("cond", cond)
    check_tensor("uncond", uncond, "[B, ...]", -1)
    check_same("cond", cond, "uncond", uncond)
    if uncond.shape != cond.shape:
        raise ValueError(
            f"uncond: expected the shape of cond {list(cond.shape)}, got {list(uncond.shape)}"
        )
    if not isinstance(guidance_scale, Tensor):
        guidance_scale = torch.full((1,), guidance_scale, dtype=torch.float64, device=cond.device)
    elif guidance_scale.shape not in ((1,), (cond.shape[0],)):
        raise ValueError(f"guidance_scale: expected [{cond.shape[0]}]")
    overload = _GUIDANCE_FACTOR.choose(backend, cond.device.type)
    result: Tensor = overload(cond, uncond, guidance_scale.double(), float(guidance_rescale))
    return result


def step_error(
    y0: Tensor,
    y1: Tensor,
    stages: Sequence[Tensor],
    weights: Tensor,
    step_size: Tensor,
    rtol: float,
    atol: float,
    *,
    backend: str | None = None,
) -> Tensor:
    """The error of a step of an embedded Runge-Kutta pair against its tolerance: the mean square of
    ``h sum_k e_k k_k / (atol + rtol max(|y0|, |y1|))`` over each sample.

    Args:
        y0, y1: ``[B, ...]``, the state before and after the step.
        stages: up to six derivatives k like them.
        weights: float64 ``[8]``: two zeros and the differences e of the pair's weights; a weight of
            0 ignores its stage.
        step_size: h, ``[1]`` or ``[B]``, float32 (float64 for float64).
        rtol, atol: the tolerances.

    Returns:
        ``[B]`` float64; of a state that is one vector the mean of these is that of the whole. NaN
        where anything is.

    Gradient: of the definition. Deterministic.

    Source: Hairer, Norsett & Wanner, Solving ordinary differential equations I, II.4.
    """
    tensors = [y0, y1, *stages]
    _check_tensors(tensors)
    if len(tensors) > TENSORS:
        raise ValueError(f"stages: expected at most {TENSORS - 2}, got {len(stages)}")
    if not isinstance(weights, Tensor) or weights.shape != (TENSORS,):
        raise ValueError(f"weights: expected a tensor [{TENSORS}]")
    if not isinstance(step_size, Tensor) or step_size.shape not in ((1,), (y0.shape[0],)):
        raise ValueError(f"step_size: expected a tensor [1] or [{y0.shape[0]}]")
    absent = (y0.new_empty(0),) * (TENSORS - len(tensors))
    overload = _STEP_ERROR.choose(backend, y0.device.type)
    result: Tensor = overload(
        *tensors,
        *absent,
        weights.double(),
        step_size.to(compute_dtype(y0)),
        float(rtol),
        float(atol),
    )
    return result


def _check_tensors(tensors: Sequence[Tensor]) -> None:
    first = tensors[0]
    check_tensor("tensors[0]", first, "[B, ...]", -1)
    check_floating("tensors[0]", first)
    wide = first.dtype == torch.float64
    for k, t in enumerate(tensors):
        if not isinstance(t, Tensor):
            raise TypeError(f"tensors[{k}]: expected a tensor, got {type(t).__name__}")
        if t.shape != first.shape:
            raise ValueError(
                f"tensors[{k}]: expected the first one's shape {list(first.shape)}, got "
                f"{list(t.shape)}"
            )
        if t.device != first.device:
            raise ValueError(f"tensors[{k}]: expected device {first.device}, got {t.device}")
        check_floating(f"tensors[{k}]", t)
        if (t.dtype == torch.float64) != wide:
            raise TypeError(
                f"tensors[{k}]: float64 goes with float64 alone, got {t.dtype} beside {first.dtype}"
            )


def _check_table(table: object, first: Tensor) -> int:
    """How many rows a step has."""
    if not isinstance(table, Tensor):
        raise TypeError(f"table: expected a tensor, got {type(table).__name__}")
    shape = table.shape
    if (
        table.dtype != torch.float64
        or len(shape) != 4
        or shape[0] < 1
        or shape[1] not in (1, first.shape[0])
        or not 1 <= shape[2] <= ROWS
        or shape[3] != WIDTH
    ):
        raise ValueError(
            f"table: expected float64 [S, 1 or {first.shape[0]}, 1 to {ROWS}, {WIDTH}], got "
            f"{table.dtype} {list(shape)}"
        )
    if table.device != first.device:
        raise ValueError(f"table: expected device {first.device}, got {table.device}")
    if table.requires_grad:
        raise ValueError("table: its gradient is not computed; detach it")
    return int(shape[2])


def _check_each(name: str, value: object, first: Tensor, *, single: bool = False) -> Tensor:
    """A number of each sample, in what the operator computes in."""
    allowed = [(first.shape[0],), *([(1,)] if single else [])]
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if tuple(value.shape) not in allowed:
        raise ValueError(f"{name}: expected one of {allowed}, got {list(value.shape)}")
    if value.device != first.device:
        raise ValueError(f"{name}: expected device {first.device}, got {value.device}")
    return value.to(compute_dtype(first))


def _bits(name: str, positions: Sequence[int], count: int) -> int:
    bits = 0
    for position in positions:
        if not 0 <= position < count:
            raise ValueError(f"{name}: expected positions below {count}, got {position}")
        bits |= 1 << position
    return bits


def _check_counter(keys: object, n: int, draw: int) -> None:
    if not isinstance(keys, Tensor):
        raise TypeError(f"keys: expected a tensor, got {type(keys).__name__}")
    if keys.dtype != torch.int64 or keys.dim() != 2 or keys.shape[1] != 2:
        raise ValueError(f"keys: expected int64 [B, 2], got {keys.dtype} {list(keys.shape)}")
    check_count("n", n)
    if not 0 <= check_count("draw", draw) < 1 << 31:
        raise ValueError(f"draw: expected below 2^31, got {draw}")
