"""Sample inputs and benchmark cases of the ``ode_step`` family."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastzoo import ops, reference
from fastzoo.reference.ode_step import BOUND, DRAW, EARLIER, NOISE, TENSORS, WIDTH, spread
from fastzoo.reference.precision import compute_dtype
from fastzoo.testing.coupling import values
from fastzoo.testing.spec import BenchmarkCase, Invalid, OpSpec, Sample
from fastzoo.testing.tolerance import unit_roundoff

# The largest counter normal is sqrt(2 * 33 log 2).
_LARGEST_NORMAL = 6.8
SEEDS = 20241


def table_of(
    *rows: tuple[float, ...],
    earlier: tuple[tuple[float, ...], ...] = (),
    noise: tuple[float, int] = (0.0, 0),
    bounds: tuple[float, ...] = (),
) -> Tensor:
    """``[1, 1, R, 13]`` of the weights of the tensors row by row, those of the rows before each,
    the noise of the last one and its draw, and the bounds of the others."""
    table = torch.zeros(1, 1, len(rows), WIDTH, dtype=torch.float64)
    table[..., BOUND] = math.inf
    for r, weights in enumerate(rows):
        table[0, 0, r, : len(weights)] = torch.tensor(weights, dtype=torch.float64)
    for r, weights in enumerate(earlier, 1):
        table[0, 0, r, EARLIER : EARLIER + len(weights)] = torch.tensor(weights).double()
    table[0, 0, -1, NOISE], table[0, 0, -1, DRAW] = noise
    for r, bound in enumerate(bounds):
        table[0, 0, r, BOUND] = bound
    return table


def step(*tensors: Tensor, **kwargs: Any) -> Any:
    """:func:`fastzoo.ops.ode_step` of its tensors one by one."""
    return ops.ode_step(tensors, **kwargs)


def samples(dtype: torch.dtype) -> Iterator[Sample]:
    def sample(name: str, shape: tuple[int, ...], count: int, **kwargs: Any) -> Sample:
        return Sample(name, tuple(values(*shape, seed=k).to(dtype) for k in range(count)), kwargs)

    euler = table_of((0.75, 0.25))
    clipped = table_of((1.5, -0.75), (0.25,), earlier=((0.5,),), bounds=(0.8,))
    for shape in ((1, 1), (37, 8), (130, 3)):
        yield sample(f"random-{shape[0]}x{shape[1]}", shape, 2, table=euler)
    yield sample("random-kept", (6, 5, 7), 3, table=clipped, keep=(0,))
    for count in (1, 4, 8):
        weights = tuple(0.3 - 0.1 * k for k in range(count))
        yield sample(f"{count}-tensors", (3, 5, 7), count, table=table_of(weights))
    three = table_of(
        (1.2, -0.4),
        (0.0, 0.5, 0.25),
        (0.1, 0.0, -0.7),
        earlier=((0.3,), (-0.6, 1.1)),
        bounds=(0.9, 0.7),
    )
    yield sample("three-rows", (4, 9), 3, table=three, keep=(0, 1))
    yield sample("three-rows-second-kept", (4, 9), 3, table=three, keep=(1,))
    yield sample("threshold", (3, 10), 2, table=clipped, threshold=torch.tensor([1.0, 1.7, 0.4]))
    factor = torch.tensor([0.5, 0.0, -2.0])
    yield sample(
        "factor", (3, 10), 3, table=table_of((1.0, 0.5, 0.25)), factor=factor, scaled=(1, 2)
    )
    yield sample("one-factor", (3, 10), 2, table=euler, factor=factor[:1], scaled=(1,))
    each = euler.repeat(1, 3, 1, 1) * torch.tensor([1.0, -0.5, 2.0]).double()[:, None, None]
    each[..., BOUND] = math.inf
    yield sample("table-of-each-sample", (3, 10), 2, table=each)
    run = torch.cat([table_of((0.0, 9.0)), table_of((0.5, 0.125)), table_of((9.0, 9.0))])
    yield sample("step-on-device", (3, 10), 2, table=run, step=torch.tensor([1]))
    noisy = table_of((0.75, 0.25), noise=(0.5, 7))
    yield sample("noise", (3, 37), 2, table=noisy, seeds=SEEDS)
    yield sample("noise-of-each-sample", (3, 37), 2, table=noisy, seeds=[5, -9, 1 << 40])
    pure = table_of((0.0,), noise=(1.0, 3))
    yield sample("noise-alone", (2, 2311), 1, table=pure, seeds=SEEDS)
    yield sample("noise-with-kept", (3, 6), 2, table=_with_noise(clipped), keep=(0,), seeds=1)
    yield sample("long-row", (2, 2311), 3, table=table_of((0.2, 0.3, 0.4)))
    yield sample("vector", (300,), 2, table=euler)
    yield sample("no-samples", (0, 4), 2, table=euler, keep=())
    yield sample("no-elements", (4, 0), 2, table=noisy, seeds=3)
    poison = Sample(
        "zero-weights-hide-infinities",
        (
            values(3, 4).to(dtype),
            torch.full((3, 4), math.inf, dtype=dtype),
            torch.full((3, 4), math.nan, dtype=dtype),
        ),
        {"table": table_of((0.5,))},
    )
    yield poison
    x = values(3, 5).to(dtype)
    x[1, 2], x[2, 0] = math.nan, math.inf
    yield Sample("nan-passes-a-bound", (x, x), {"table": clipped, "keep": (0,)})
    if dtype in (torch.float16, torch.bfloat16):
        yield sample("stochastic", (3, 37), 2, table=noisy, seeds=SEEDS, stochastic=True)
    if dtype == torch.float32:
        x, first, second = (values(3, 21, seed=k) for k in range(3))
        for kind in (torch.float16, torch.bfloat16):
            mixed = (x, first.to(kind), second)
            yield Sample(f"beside-{kind}", mixed, {"table": table_of((0.5, 0.25, 1.0))})


def _with_noise(table: Tensor) -> Tensor:
    noisy = table.clone()
    noisy[..., -1, NOISE] = 0.5
    return noisy


def invalid() -> Iterator[Invalid]:
    x, table = values(4, 6), table_of((0.5, 0.5))
    plain = {"table": table}

    def wrong(name: str, match: str, *args: Any, **kwargs: Any) -> Invalid:
        return Invalid(name, args or (x, x), {**plain, **kwargs}, ValueError, match)

    yield Invalid("list", ([1.0], x), plain, TypeError, "tensors")
    yield Invalid("integers", (x.long(), x.long()), plain, TypeError, "tensors")
    yield Invalid("float64-mixed", (x, x.double()), plain, TypeError, "float64")
    yield wrong("nine", "tensors", *(x,) * 9)
    yield wrong("shape", "tensors", x, x[:, :5])
    yield Invalid("table-list", (x, x), {"table": [[0.5]]}, TypeError, "table")
    yield wrong("table-dtype", "table", table=table.float())
    yield wrong("table-shape", "table", table=table[0])
    yield wrong("table-samples", "table", table=table.repeat(1, 3, 1, 1))
    yield wrong("table-rows", "table", table=table.repeat(1, 1, 4, 1))
    yield wrong("table-gradient", "table", table=table.clone().requires_grad_())
    yield wrong("step", "step", step=torch.tensor([0, 1]))
    yield wrong("factor", "factor", factor=torch.ones(3), scaled=(0,))
    yield wrong("threshold", "threshold", threshold=torch.ones(1))
    yield wrong("scaled", "scaled", scaled=(2,))
    yield wrong("keep", "keep", keep=(0,))
    yield wrong("seeds", "seeds", seeds=[1, 2])
    yield Invalid("seeds-word", (x, x), {**plain, "seeds": "one"}, TypeError, "seeds")
    yield wrong("stochastic", "seeds", stochastic=True)
    yield wrong("backend", "backend", backend="gpu")


def _wide(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value


def definition(*tensors: Tensor, **kwargs: Any) -> Any:
    """In float64, its results in the first tensor's dtype; rounded to nearest."""
    named = {name: _wide(value) for name, value in kwargs.items() if name != "stochastic"}
    wide = dispatch_args(*(t.double() for t in tensors), **named)
    out, *kept = reference.ode_step_rows(*wide)
    keep = kwargs.get("keep", ())
    dtype = tensors[0].dtype
    return (out.to(dtype), *(kept[r].to(dtype) for r in keep)) if keep else out.to(dtype)


def tolerance(*tensors: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
    """Absolute errors allowed of each result: a row has at most 11 terms, each good to 4 roundings
    (the weight's, its product's with the factor, the product's and the sum's before it, of which
    there are 11) of its size; a noise is good to 8 of itself. A result is rounded once; by chance,
    to one of its two neighbours."""
    table = kwargs["table"].abs()
    table[..., BOUND] = math.inf
    threshold = kwargs.get("threshold")
    if threshold is not None:
        table = table.repeat(1, len(threshold), 1, 1)
        table[:, :, 0, :BOUND] /= threshold[:, None].double()
    sizes = tuple(t.double().abs().nan_to_num(0, 0, 0) for t in tensors)
    rows = table.shape[2]
    factor = kwargs.get("factor")
    named = {
        "table": table,
        "step": kwargs.get("step"),
        "scaled": kwargs.get("scaled", ()),
        "factor": None if factor is None else factor.double().abs(),
        "keep": tuple(range(rows - 1)),
    }
    of_rows = reference.ode_step_rows(*dispatch_args(*sizes, **named))
    noise = _LARGEST_NORMAL * float(table[..., -1, NOISE].max())
    work, store = unit_roundoff(compute_dtype(tensors[0])), unit_roundoff(tensors[0].dtype)
    rounding = 4 if kwargs.get("stochastic") else 2
    least = torch.finfo(tensors[0].dtype).smallest_normal * torch.finfo(tensors[0].dtype).eps
    bounds = [16 * work * size + rounding * store * size + least for size in of_rows]
    bounds[0] = bounds[0] + (16 * work + rounding * store) * noise
    return (bounds[0], *(bounds[1 + r] for r in kwargs.get("keep", ())))


def dispatch_args(*tensors: Tensor, **kwargs: Any) -> tuple[Any, ...]:
    first = tensors[0]
    none = first.new_empty(0)
    step, factor, threshold, seeds = (
        kwargs.get(name) for name in ("step", "factor", "threshold", "seeds")
    )
    nowhere = torch.empty(0, dtype=torch.int64)
    return (
        *tensors,
        *(none,) * (TENSORS - len(tensors)),
        kwargs["table"],
        nowhere if step is None else step,
        none if factor is None else factor.to(compute_dtype(first)),
        none if threshold is None else threshold.to(compute_dtype(first)),
        nowhere if seeds is None else ops.counter_keys(seeds, first.shape[0]),
        sum(1 << k for k in kwargs.get("scaled", ())),
        sum(1 << r for r in kwargs.get("keep", ())),
        kwargs.get("stochastic", False),
    )


def all_outputs(output: Any) -> Tensor:
    """Their squares: the step itself is linear, and so its gradient would depend on nothing."""
    outputs = (output,) if isinstance(output, Tensor) else output
    return torch.cat([o.to(compute_dtype(o)).square().flatten() for o in outputs])


def gradient_sample(dtype: torch.dtype) -> Sample:
    """With two rows, one bounded far from where it bends, and a factor."""
    tensors = tuple(values(2, 3, seed=k).to(dtype) for k in (4, 5, 6))
    table = table_of((0.9, -0.7), (0.25, 0.0, 0.6), earlier=((0.5,),), bounds=(50.0,))
    named = {"table": table, "factor": torch.tensor([0.5, 2.0], dtype=dtype), "scaled": (1,)}
    return Sample("gradient", tensors, {**named, "keep": (0,)})


def eager(x: Tensor, output: Tensor, before: Tensor) -> Tensor:
    """DPM-Solver++ (2M) as it is written: what the model predicts, its difference, the update."""
    denoised = (x - 0.8 * output) / 0.6
    change = (denoised - before) / 1.1
    return 0.7 * x + 0.25 * denoised + 0.125 * change


_MULTISTEP = table_of(
    (1 / 0.6, -0.8 / 0.6), (0.7, 0.0, -0.125 / 1.1), earlier=((0.25 + 0.125 / 1.1,),)
)


def _case(batch: int, *shape: int) -> BenchmarkCase:
    n = math.prod(shape)

    def make(device: str, batch: int, n: int) -> tuple[Any, ...]:
        return tuple(values(batch, n, seed=k, device=device) for k in range(3))

    return BenchmarkCase(
        name=f"{batch} x {' x '.join(map(str, shape))}, second order multistep",
        shape={"batch": batch, "n": n},
        make=make,
        kwargs={"table": _MULTISTEP},
        flops=lambda x, *_, **__: 10.0 * x.numel(),
        bytes=lambda x, *_, **__: 4.0 * x.element_size() * x.numel(),
        tolerance=lambda x, *_, **__: 64 * 2.0**-24,
    )


ODE_STEP = OpSpec(
    name="ode_step",
    function=step,
    definition=definition,
    eager=eager,
    samples=samples,
    invalid=invalid,
    dispatch_args=dispatch_args,
    fixed_shape=True,
    differentiable=all_outputs,
    gradient_sample=gradient_sample,
    tolerance=tolerance,
    # A gradient is rounded to its own tensor's dtype, which need not be the state's, and what is
    # squared has been rounded.
    gradient_rtol=lambda dtype, *tensors, **__: (
        64 * unit_roundoff(compute_dtype(tensors[0]))
        + 8 * max(unit_roundoff(t.dtype) for t in tensors)
    ),
    benchmarks=(_case(8, 4, 128, 128),),
)


def _keys(batch: int) -> Tensor:
    return ops.counter_keys(SEEDS, batch)


def counter_samples(dtype: torch.dtype) -> Iterator[Sample]:
    for batch, n, draw in ((1, 1, 0), (3, 5, 1), (2, 4096, 17), (37, 8, 3), (2, 37, (1 << 31) - 1)):
        name = "random-" if n in (5, 8) else ""
        yield Sample(f"{name}{batch}x{n}-{draw}", (_keys(batch), n, draw))
    wide = torch.tensor([[-1, -1], [1 << 62, 1 << 33], [5, (1 << 32) - 1]])
    yield Sample("wide-keys", (wide, 9, 2))
    yield Sample("no-samples", (_keys(0), 4, 0))
    yield Sample("no-elements", (_keys(3), 0, 0))


def counter_invalid() -> Iterator[Invalid]:
    yield Invalid("list", ([1, 2], 4), {}, TypeError, "keys")
    yield Invalid("dtype", (_keys(2).int(), 4), {}, ValueError, "keys")
    yield Invalid("shape", (_keys(2)[:, :1], 4), {}, ValueError, "keys")
    yield Invalid("n", (_keys(2), -1), {}, ValueError, "n")
    yield Invalid("draw", (_keys(2), 4, 1 << 31), {}, ValueError, "draw")
    yield Invalid("backend", (_keys(2), 4), {"backend": "gpu"}, ValueError, "backend")


def _counter_case(batch: int, n: int, flops: float, size: int) -> BenchmarkCase:
    return BenchmarkCase(
        name=f"{batch} x {n}",
        shape={"batch": batch, "n": n},
        make=lambda device, batch, n: (_keys(batch).to(device), n, 1),
        kwargs={},
        flops=lambda keys, n, *_: flops * keys.shape[0] * n,
        bytes=lambda keys, n, *_: float(size) * keys.shape[0] * n,
    )


def _counter_spec(name: str, definition: Any, eager: Any, flops: float, size: int) -> OpSpec:
    return OpSpec(
        name=name,
        function=getattr(ops, name),
        # The bits are the definition: there is no tolerance.
        definition=definition,
        eager=eager,
        samples=counter_samples,
        invalid=counter_invalid,
        dispatch_args=lambda keys, n, draw=0: (keys, n, draw),
        dtypes=(torch.float32,),
        whole=(0,),
        fixed_shape=True,
        benchmarks=(_counter_case(8, 65536, flops, size),),
    )


COUNTER_BITS = _counter_spec(
    "counter_bits",
    lambda keys, n, draw=0: reference.counter_bits(keys, n, draw),
    lambda keys, n, draw: torch.randint(1 << 32, (keys.shape[0], n), device=keys.device),
    20,
    8,
)
COUNTER_NORMAL = _counter_spec(
    "counter_normal",
    lambda keys, n, draw=0: reference.counter_normals(keys, n, draw),
    lambda keys, n, draw: torch.randn(keys.shape[0], n, device=keys.device),
    60,
    4,
)


def _guidance_samples(dtype: torch.dtype) -> Iterator[Sample]:
    def sample(name: str, *shape: int, scale: Any = 7.5, rescale: float = 0.7) -> Sample:
        cond, uncond = (values(*shape, seed=k).to(dtype) for k in range(2))
        return Sample(name, (cond, uncond, scale, rescale))

    for shape in ((1, 2), (5, 33), (37, 8)):
        yield sample(f"random-{shape[0]}x{shape[1]}", *shape)
    yield sample("image", 2, 4, 9, 31)
    yield sample("no-rescaling", 3, 8, rescale=0.0)
    yield sample("of-each-sample", 3, 8, scale=torch.tensor([1.0, 3.0, 12.0]).double())
    cond, uncond = (values(2, 4099, seed=k) for k in range(2))
    if dtype in (torch.float32, torch.float64):
        yield Sample("far-from-zero", ((cond + 900).to(dtype), (uncond + 900).to(dtype), 5.0, 1.0))
    yield sample("no-samples", 0, 4)


def _guidance_invalid() -> Iterator[Invalid]:
    x = values(4, 6)
    yield Invalid("list", ([1.0], x, 2.0, 0.5), {}, TypeError, "cond")
    yield Invalid("shape", (x, x[:2], 2.0, 0.5), {}, ValueError, "uncond")
    yield Invalid("scale", (x, x, torch.ones(3), 0.5), {}, ValueError, "guidance_scale")
    yield Invalid("backend", (x, x, 2.0, 0.5), {"backend": "gpu"}, ValueError, "backend")


def _guidance_definition(cond: Tensor, uncond: Tensor, scale: Any, rescale: float) -> Tensor:
    c, u = cond.double().flatten(1), uncond.double().flatten(1)
    s = scale[:, None] if isinstance(scale, Tensor) else scale
    guided = u + s * (c - u)
    # A rescaling by 0 is none, whatever the spreads are.
    factor = rescale * spread(c) / spread(guided) + 1 - rescale if rescale else torch.ones(len(c))
    return factor.to(compute_dtype(cond))


def _guidance_tolerance(cond: Tensor, uncond: Tensor, scale: Any, rescale: float) -> Tensor:
    """A deviation from the mean is good to 4 roundings of the size of what it is of, and a standard
    deviation no worse than its root mean square; the guided one is of terms as large as s."""
    c, u = cond.double().flatten(1), uncond.double().flatten(1)
    s = scale[:, None] if isinstance(scale, Tensor) else torch.full_like(c[:, :1], scale)
    guided = u + s * (c - u)
    size = (u.abs() + s * (c - u).abs()).square().mean(1).sqrt()
    relative = c.square().mean(1).sqrt() / spread(c) + size / spread(guided)
    factor = rescale * spread(c) / spread(guided)
    work = unit_roundoff(compute_dtype(cond))
    return work * (16 * relative * factor + 4)


GUIDANCE_FACTOR = OpSpec(
    name="guidance_factor",
    function=ops.guidance_factor,
    definition=_guidance_definition,
    eager=_guidance_definition,
    samples=_guidance_samples,
    invalid=_guidance_invalid,
    dispatch_args=lambda cond, uncond, scale, rescale: (
        cond,
        uncond,
        scale if isinstance(scale, Tensor) else torch.full((1,), scale, dtype=torch.float64),
        rescale,
    ),
    fixed_shape=True,
    tolerance=_guidance_tolerance,
    benchmarks=(
        BenchmarkCase(
            name="8 x 4 x 128 x 128",
            shape={"batch": 8, "n": 65536},
            make=lambda device, batch, n: (
                values(batch, n, seed=0, device=device),
                values(batch, n, seed=1, device=device),
                7.5,
                0.7,
            ),
            kwargs={},
            flops=lambda cond, *_: 8.0 * cond.numel(),
            bytes=lambda cond, *_: 2.0 * cond.element_size() * cond.numel(),
            tolerance=lambda cond, *_: 1e-5,
        ),
    ),
)


def error(*tensors: Tensor, weights: tuple[float, ...], step_size: Any, **kwargs: Any) -> Tensor:
    """:func:`fastzoo.ops.step_error` of its stages one by one."""
    y0, y1, *stages = tensors
    padded = torch.zeros(TENSORS, dtype=torch.float64, device=step_size.device)
    padded[2 : 2 + len(weights)] = torch.tensor(weights, dtype=torch.float64)
    result: Tensor = ops.step_error(y0, y1, stages, padded, step_size, 1e-3, 1e-4, **kwargs)
    return result


def _error_samples(dtype: torch.dtype) -> Iterator[Sample]:
    def sample(name: str, shape: tuple[int, ...], weights: tuple[float, ...], h: Any) -> Sample:
        tensors = tuple(values(*shape, seed=k).to(dtype) for k in range(2 + len(weights)))
        return Sample(name, tensors, {"weights": weights, "step_size": torch.tensor(h)})

    pair = (0.5, -0.5)
    for shape in ((1, 1), (5, 33), (37, 8)):
        yield sample(f"random-{shape[0]}x{shape[1]}", shape, pair, [0.01])
    yield sample("six-stages", (3, 4, 5), (0.1, -0.2, 0.3, -0.4, 0.5, -0.3), [0.01])
    yield sample("of-each-sample", (3, 8), pair, [0.01, 0.1, 1.0])
    yield sample("long-row", (2, 4099), pair, [0.01])
    yield sample("vector", (300,), pair, [0.01])
    y0, y1, k0, k1 = (values(3, 8, seed=k).to(dtype) for k in range(4))
    y1[1, 2], k1[:] = math.nan, math.inf
    named = {"weights": (0.5, 0.0), "step_size": torch.tensor([0.01])}
    yield Sample("nan-and-ignored-infinity", (y0, y1, k0, k1), named)
    yield sample("no-samples", (0, 4), pair, [0.01])


def _error_invalid() -> Iterator[Invalid]:
    x, named = values(4, 6), {"weights": (0.5, -0.5), "step_size": torch.ones(1)}
    yield Invalid("list", ([1.0], x, x), named, TypeError, "tensors")
    yield Invalid("shape", (x, x[:2], x), named, ValueError, "tensors")
    yield Invalid("too-many", (x,) * 9, named, ValueError, "stages")
    yield Invalid(
        "step-size", (x, x, x), {**named, "step_size": torch.ones(3)}, ValueError, "step_size"
    )
    yield Invalid("backend", (x, x, x), {**named, "backend": "gpu"}, ValueError, "backend")


def _error_args(*tensors: Tensor, weights: tuple[float, ...], step_size: Tensor) -> tuple[Any, ...]:
    padded = torch.zeros(TENSORS, dtype=torch.float64)
    padded[2 : 2 + len(weights)] = torch.tensor(weights, dtype=torch.float64)
    absent = (tensors[0].new_empty(0),) * (TENSORS - len(tensors))
    return *tensors, *absent, padded, step_size.to(compute_dtype(tensors[0])), 1e-3, 1e-4


def _error_definition(*tensors: Tensor, **kwargs: Any) -> Tensor:
    result: Tensor = reference.step_error(*_error_args(*(t.double() for t in tensors), **kwargs))
    return result


def _error_tolerance(*tensors: Tensor, **kwargs: Any) -> Tensor:
    """An error is good to 12 roundings of its terms' sizes, its square to twice that; sums of at
    most 1024 in a lane, and 128 roundings of them."""
    wide = [t.double().nan_to_num(0, 0, 0) for t in tensors]
    y0, y1, *stages = (t.reshape(len(t), t.numel() // max(len(t), 1)) for t in wide)
    h = kwargs["step_size"].double()[:, None]
    zero = torch.zeros_like(y0)
    size = sum((abs(w) * k.abs() for w, k in zip(kwargs["weights"], stages, strict=True)), zero)
    size = size * h.abs() / (1e-4 + 1e-3 * torch.maximum(y0.abs(), y1.abs()))
    mean: Tensor = size.square().mean(1)
    return 160 * unit_roundoff(compute_dtype(tensors[0])) * mean


STEP_ERROR = OpSpec(
    name="step_error",
    function=error,
    definition=_error_definition,
    eager=lambda y0, y1, k0, k1: (
        (0.01 * (0.5 * k0 - 0.5 * k1) / (1e-4 + 1e-3 * torch.maximum(y0.abs(), y1.abs())))
        .square()
        .mean(1)
    ),
    samples=_error_samples,
    invalid=_error_invalid,
    dispatch_args=_error_args,
    fixed_shape=True,
    tolerance=_error_tolerance,
    benchmarks=(
        BenchmarkCase(
            name="4096 x 64, two stages",
            shape={"batch": 4096, "n": 64},
            make=lambda device, batch, n: tuple(
                values(batch, n, seed=k, device=device) for k in range(4)
            ),
            kwargs={"weights": (0.5, -0.5), "step_size": torch.tensor([0.01])},
            flops=lambda y0, *_, **__: 10.0 * y0.numel(),
            bytes=lambda y0, *_, **__: 4.0 * y0.element_size() * y0.numel(),
            tolerance=lambda y0, *_, **__: 1e-5,
        ),
    ),
)

SPECS = (ODE_STEP, COUNTER_BITS, COUNTER_NORMAL, GUIDANCE_FACTOR, STEP_ERROR)
