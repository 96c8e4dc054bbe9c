"""What the schedulers share: their place in diffusers, their configuration, and one kernel a step.

A scheduler is written as its paper has it. It derives from :class:`Scheduler` and from diffusers'
class of its name (``parent``), and has

* ``__init__``, decorated with :func:`register_to_config`: diffusers' arguments and defaults. It
  computes the noise levels in float64 (``noise_levels.py``) and publishes diffusers' attributes.
* ``set_timesteps``, which ends in ``self._publish(timesteps, sigmas, device)``.
* ``rows``: the step as combinations of tensors (:mod:`fastzoo.samplers.algebra`), for many steps at
  once: ``steps`` is an array of their indices, and a coefficient is an array with one number for
  each. The last row is the next sample; those before it are returned too. A row called ``x0`` is
  what ``clip_sample`` and ``thresholding`` are about. No row has a tensor's name (``sample``).
  ``rows`` runs once a run, at its first step.
* ``groups``, only where some steps are of another structure than others (no noise in the last, a
  lower order in the first): the indices that ``rows`` takes together.
* ``history``, if any: ``rows`` names the tensors of earlier steps as the ``history`` does that
  ``step`` hands to :meth:`Scheduler._advance`.
* ``step``: diffusers' arguments, those that change the coefficients gathered in ``options``
  (hashable; a change of them builds the tables again), and one call of :meth:`Scheduler._advance`.

:class:`fastzoo.samplers.diffusers.DDIMScheduler` is the example.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, TypeAlias

import numpy
import torch
from torch import Tensor

from fastzoo import ops
from fastzoo.ops.ode_step import DRAW
from fastzoo.samplers import formulas
from fastzoo.samplers.algebra import Combination, Program, Tables, noise, tensor

PREDICTIONS = {
    "epsilon": "epsilon",
    "sample": "denoised",
    "original_sample": "denoised",
    "v_prediction": "v",
    "flow_prediction": "velocity",
}


def _diffusers() -> ModuleType | None:
    try:
        return importlib.import_module("diffusers")
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        return None


DIFFUSERS = _diffusers()


class SchedulerOutput:
    """``prev_sample`` and ``pred_original_sample``: by attribute, by name, by number.

    The latter may be a function, which is called when it is first read: few loops read x0, and
    writing it is a quarter of a step's time.
    """

    __slots__ = ("_x0", "prev_sample")

    def __init__(
        self,
        prev_sample: Tensor,
        pred_original_sample: Tensor | Callable[[], Tensor] | None = None,
    ) -> None:
        self.prev_sample = prev_sample
        self._x0 = pred_original_sample

    @property
    def pred_original_sample(self) -> Tensor | None:
        if callable(self._x0):
            self._x0 = self._x0()
        return self._x0

    def to_tuple(self) -> tuple[Tensor, ...]:
        x0 = self.pred_original_sample
        return (self.prev_sample,) if x0 is None else (self.prev_sample, x0)

    def __getitem__(self, which: str | int | slice) -> Any:
        if which in (0, "prev_sample"):
            return self.prev_sample
        return getattr(self, which) if isinstance(which, str) else self.to_tuple()[which]

    def __len__(self) -> int:
        return 1 if self._x0 is None else 2


def _unchanged(tensors: list[Tensor], compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Computes later what these tensors give now, or says that they were written to."""

    def versions() -> list[int]:
        return [0 if t.is_inference() else t._version for t in tensors]

    before = versions()

    def later() -> Tensor:
        if versions() != before:
            raise RuntimeError(
                "pred_original_sample: a tensor given to step was changed in place since; read "
                "it before that, or take it with return_dict=False"
            )
        return compute()

    return later


if DIFFUSERS is None:

    class _Config(dict[str, Any]):
        """A scheduler's arguments, read by name or as attributes."""

        def __getattr__(self, name: str) -> Any:
            try:
                return self[name]
            except KeyError:
                raise AttributeError(name) from None

    class _Alone:
        """What schedulers need of diffusers where it is not installed."""

        def register_to_config(self, **arguments: Any) -> None:
            self._internal_dict: Any = {**getattr(self, "_internal_dict", {}), **arguments}

        @property
        def config(self) -> Any:
            return self._internal_dict

        @classmethod
        def from_config(cls, config: Mapping[str, Any], **arguments: Any) -> Any:
            """A scheduler with the arguments that it shares with another's config; what that one
            had by default is this one's default. ``arguments`` come before the config's."""
            defaults = config.get("_use_default_values", [])
            asked = {name: value for name, value in config.items() if name not in defaults}
            known = set(inspect.signature(cls.__init__).parameters) - {"self"}
            unknown = set(arguments) - known
            if unknown:
                raise TypeError(f"{cls.__name__} has no arguments {sorted(unknown)}")
            made = cls(**{**{k: v for k, v in asked.items() if k in known}, **arguments})
            hidden = {k: v for k, v in asked.items() if k not in known and not k.startswith("_")}
            made.register_to_config(**hidden)
            return made

    def parent(name: str) -> type:
        """Diffusers' class of this name, or what stands for it where it is not installed."""
        return _Alone

    def register_to_config(init: Callable[..., None]) -> Callable[..., None]:
        """The arguments of ``__init__`` are the scheduler's ``config``."""
        signature = inspect.signature(init)

        @functools.wraps(init)
        def registered(self: Any, *args: Any, **kwargs: Any) -> None:
            bound = signature.bind(self, *args, **kwargs)
            given = set(bound.arguments)
            bound.apply_defaults()
            arguments = {name: v for name, v in bound.arguments.items() if name != "self"}
            defaults = [name for name in arguments if name not in given]
            self.register_to_config(**arguments, _use_default_values=defaults)
            init(self, *args, **kwargs)

        return registered

else:
    _configuration = importlib.import_module("diffusers.configuration_utils")
    register_to_config = _configuration.register_to_config

    class _Config(_configuration.FrozenDict):  # type: ignore[no-redef, misc, name-defined]
        """A config that knows that its scheduler is ours; its copy ``dict(config)`` does not."""

    def parent(name: str) -> type:
        """Diffusers' class of this name, or what stands for it where it is not installed."""
        found: type = getattr(DIFFUSERS, name)
        return found


def _keep_ours(theirs: Any, ours: type) -> None:
    """``theirs.from_config`` of a config of one of our schedulers makes ours: some pipelines
    rebuild the scheduler that they are given by diffusers' class of its name. Nothing else is
    changed."""
    original = theirs.from_config.__func__

    @functools.wraps(original)
    def from_config(cls: Any, config: Any = None, *args: Any, **kwargs: Any) -> Any:
        kept = ours if cls is theirs and type(config) is _Config else cls
        return original(kept, config, *args, **kwargs)

    theirs.from_config = classmethod(from_config)


def randn(
    shape: tuple[int, ...], generator: Any, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Noise of a generator, or of a list of one for each sample; where the generator is on the CPU
    it is drawn there, the same on every device."""
    if isinstance(generator, (list, tuple)):
        if len(generator) not in (1, shape[0]):
            raise ValueError(f"generator: expected 1 or {shape[0]}, got {len(generator)}")
        if len(generator) > 1:
            return torch.cat([randn((1, *shape[1:]), g, device, dtype) for g in generator])
        generator = generator[0]
    where = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=where, dtype=dtype).to(device)


class _Run:
    """The programs of a run's steps from ``first`` on, for one set of options, and their tables.

    Args:
        key: the options.
        programs: for each group of steps, the step and what only computes its x0, if that is
            thresholded.
        places: for each step, its group and its row of the group's table.
    """

    def __init__(
        self,
        key: Any,
        first: int,
        programs: list[tuple[Program, Program | None]],
        places: list[tuple[int, int]],
    ) -> None:
        self.key = key
        self.first = first
        self._programs = programs
        self._places = places
        self._flat = [p for pair in programs for p in pair if p is not None]
        self._tables = Tables(self._flat)
        self._on: dict[torch.device, list[_Step]] = {}

    def on(self, device: torch.device) -> "list[_Step]":
        """Each step's programs and their tables ``[1, 1, R, 13]``."""
        found = self._on.get(device)
        if found is None:
            tables = iter(t.transpose(0, 1).split(1) for t in self._tables.on(device))
            groups = [
                (p, next(tables), peek, None if peek is None else next(tables))
                for p, peek in self._programs
            ]
            found = self._on[device] = [
                (p, t[row], peek, None if peek_t is None else peek_t[row])
                for p, t, peek, peek_t, row in ((*groups[g], row) for g, row in self._places)
            ]
        return found


_Step: TypeAlias = tuple[Program, Tensor, Program | None, Tensor | None]


class Scheduler:
    """A scheduler's steps, whatever its formulas are; see the module's text."""

    # The next sample has the dtype that torch makes of the sample's and the model output's, or,
    # where diffusers casts it so, the latter.
    like_output = False
    # Any timestep may be given at any time (DDIM, DDPM), or they come in their order.
    any_order = False
    order = 1
    init_noise_sigma: Any = 1.0

    config: Any
    _internal_dict: Any
    timesteps: Tensor
    sigmas: Tensor
    num_inference_steps: int | None = None
    _begin_index: int | None = None
    _step_index: int | None = None
    _run: _Run | None = None
    _keys: tuple[Any, Tensor, Any] | None = None
    _levels: numpy.ndarray
    _mixtures: dict[str, tuple[Program, Tables]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith(f"{__package__}."):
            # Where a saved pipeline finds the class, and beside it diffusers' SchedulerMixin.
            cls.__module__ = __package__
        for base in cls.__bases__ if DIFFUSERS is not None else ():
            if base.__name__ == cls.__name__ and base.__module__.startswith("diffusers."):
                _keep_ours(base, cls)

    def register_to_config(self, **arguments: Any) -> None:
        super().register_to_config(**arguments)  # type: ignore[misc]
        self._internal_dict = _Config(self._internal_dict)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    # What a scheduler defines.

    def rows(
        self, steps: numpy.ndarray, x: Combination, output: Combination, noise: Any, *options: Any
    ) -> dict[str, Combination]:
        """The formulas of these steps, of the sample, the model's output (guided) and the standard
        normal noise, if they have any."""
        raise NotImplementedError

    def groups(self, steps: numpy.ndarray, *options: Any) -> list[numpy.ndarray]:
        """The steps that ``rows`` takes together."""
        return [steps]

    # Where a run is.

    @property
    def step_index(self) -> int | None:
        """The number of the next step; None before the first one of a run."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Where a run begins; None where its first timestep tells."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The run begins at this step (image to image)."""
        self._begin_index = begin_index

    def _publish(
        self,
        timesteps: numpy.ndarray,
        sigmas: numpy.ndarray | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """A run's timesteps and noise levels, as formulas take them (float64) and as users see
        them. Timesteps that are not integers are float32, as diffusers has them."""
        whole = timesteps.dtype.kind == "i"
        shown = torch.from_numpy(timesteps.astype(numpy.int64 if whole else numpy.float32))
        self._grid = timesteps
        self._host: list[float] = shown.tolist()
        self._places: dict[float, list[int]] = {}
        for place, t in enumerate(self._host):
            self._places.setdefault(t, []).append(place)
        self.timesteps = self._shown_timesteps = shown.to(device)
        self._shown_sigmas = None
        if sigmas is not None:
            self._levels = sigmas
            self.sigmas = self._shown_sigmas = torch.from_numpy(sigmas.astype(numpy.float32))
        self._begin_index = self._step_index = self._run = None
        self._mixtures = {}

    def _adopt(self) -> None:
        """Takes the timesteps or noise levels that were assigned to the attributes."""
        timesteps, begin = self.timesteps, self._begin_index
        sigmas = None if self._shown_sigmas is None else self.sigmas.cpu().double().numpy()
        self._publish(timesteps.cpu().numpy(), sigmas, timesteps.device)
        self.timesteps = self._shown_timesteps = timesteps
        self._begin_index = begin

    def index_for_timestep(
        self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None
    ) -> int:
        """The step of a timestep; of one that stands twice, the second, so that a run that begins
        in the middle skips no noise level. The value of a part of ``timesteps`` on a device is not
        read: its address tells."""
        if isinstance(timestep, Tensor):
            place = self._by_address(timestep)
            timestep = timestep.item() if place is None else self._host[place]
        if schedule_timesteps is None or schedule_timesteps is self.timesteps:
            found = self._places.get(timestep, [])
        else:
            found = (schedule_timesteps == timestep).nonzero().flatten().tolist()
        if not found:
            raise ValueError(f"timestep: {timestep} is not one of this run's {self._host}")
        return found[min(1, len(found) - 1)]

    def _by_address(self, timestep: Tensor) -> int | None:
        """The place of a part of ``timesteps`` whose value could only be had by waiting for the
        device."""
        whole = self.timesteps
        if timestep.is_cpu or timestep.device != whole.device or timestep.dtype != whole.dtype:
            return None
        size = whole.element_size()
        offset = timestep.data_ptr() - whole.data_ptr()
        return offset // size if 0 <= offset < size * whole.numel() else None

    def _place(self, timestep: Any) -> int:
        """Which step this is. In any order: the timestep's; of a device's tensor that is no part of
        ``timesteps``, as in order. In order: the next one, and at first ``begin_index`` or the
        timestep's."""
        if self.timesteps is not self._shown_timesteps or (
            self._shown_sigmas is not None and self.sigmas is not self._shown_sigmas
        ):
            self._adopt()
        place = self._step_index
        if self.any_order:
            if not isinstance(timestep, Tensor):
                place = self._find(timestep)
            elif timestep.is_cpu:
                place = self._find(timestep.item())
            else:
                by_address = self._by_address(timestep)
                place = place if by_address is None else by_address
        if place is None:
            begin = self._begin_index
            place = self.index_for_timestep(timestep) if begin is None else begin
            self._step_index = place
        if place >= len(self._host):
            raise ValueError(
                f"step: this run has {len(self._host)} steps; set_timesteps begins anew"
            )
        return place

    def _find(self, timestep: float) -> int:
        return self.index_for_timestep(timestep)

    # The step.

    def _denoised(self, x: Any, output: Any, alpha: Any, sigma: Any) -> Any:
        """x0 of a model's output, by the config's ``prediction_type``."""
        prediction = self.config.prediction_type
        if prediction not in PREDICTIONS:
            raise ValueError(
                f"prediction_type: expected one of {tuple(PREDICTIONS)}, got {prediction!r}"
            )
        if prediction == "epsilon" and numpy.any(numpy.asarray(alpha) == 0):
            raise ValueError(
                "prediction_type: 'epsilon' says nothing of the data where alpha is 0 (zero "
                "terminal signal-to-noise ratio); 'v_prediction' and 'sample' do"
            )
        return formulas.denoised(PREDICTIONS[prediction], x, output, alpha, sigma)

    def _prepare(self, index: int, key: Any) -> _Run:
        """The programs of the steps from this one on."""
        options, seeded, guidance_scale, rescaled, like = key
        output = tensor("output")
        if guidance_scale is not None:
            output = formulas.guided(tensor("uncond"), tensor("cond"), guidance_scale)
            like = "cond" if like == "output" else like
        scaled = [str(name) for name in output.terms] if rescaled else []
        thresholding = getattr(self.config, "thresholding", False)
        bounds = {}
        if getattr(self.config, "clip_sample", False) and not thresholding:
            bounds["x0"] = float(self.config.clip_sample_range)
        programs: list[tuple[Program, Program | None]] = []
        places: dict[int, tuple[int, int]] = {}
        for steps in self.groups(numpy.arange(index, len(self._grid)), *options):
            if not len(steps):
                continue
            z = noise(0) if seeded else tensor("noise")
            rows = self.rows(steps, tensor("sample"), output, z, *options)
            kept = list(rows)[:-1]
            program = Program(rows, like, keep=kept, bounds=bounds, scaled=scaled)
            peek = None
            if thresholding:
                peek = Program({"x0": rows["x0"]}, like, scaled=scaled)
            for made in (program, peek):
                if made is not None and len(made.table) != len(steps):
                    made.table = numpy.repeat(made.table, len(steps), 0)
            if program.noisy:
                # rows() could not know which of the steps draws.
                program.table[:, -1, DRAW] = steps + 1
            places |= {int(step): (len(programs), row) for row, step in enumerate(steps)}
            programs.append((program, peek))
        ordered = [places[step] for step in range(index, len(self._grid))]
        self._run = _Run(key, index, programs, ordered)
        return self._run

    def _advance(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        options: tuple[Any, ...] = (),
        *,
        history: Mapping[str, Tensor] | None = None,
        noise: Tensor | None = None,
        noise_dtype: torch.dtype | None = None,
        generator: Any = None,
        seeds: Any = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        later: bool = False,
    ) -> Any:
        """The values of the step's rows, the next sample first.

        Args:
            options: what ``rows`` and ``groups`` take.
            history: the other tensors that ``rows`` names.
            noise: standard normal noise in place of that drawn from ``generator`` (with diffusers'
                call: the same numbers) or counted from ``seeds``.
            noise_dtype: what noise is drawn in; None for the model output's.
            guidance_scale, guidance_rescale: of classifier-free guidance; the model's output is
                then of twice the batch, the unconditional half first.
            later: of a step whose rows are x0 and the next sample: x0 is what computes it.
        """
        index = self._place(timestep)
        like = "sample"
        if model_output.dtype != sample.dtype:
            like, model_output, sample = self._of_one_kind(model_output, sample)
        if guidance_scale is None:
            tensors = {"sample": sample, "output": model_output}
        else:
            guidance_scale = float(guidance_scale)
            if model_output.shape[0] != 2 * sample.shape[0]:
                raise ValueError(
                    f"model_output: expected a batch of {2 * sample.shape[0]} with guidance_scale, "
                    f"the unconditional half first, got {model_output.shape[0]}"
                )
            uncond, cond = model_output.chunk(2)
            tensors = {"sample": sample, "uncond": uncond, "cond": cond}
        seeded = seeds is not None and noise is None
        rescaled = guidance_scale is not None and guidance_rescale != 0
        key = (options, seeded, guidance_scale, rescaled, like)
        run = self._run
        if run is None or run.key != key or index < run.first:
            run = self._prepare(index, key)
        program, table, peek, peek_table = run.on(sample.device)[index - run.first]
        if history:
            tensors.update(history)
        if "noise" in program.inputs:
            if noise is None:
                dtype = noise_dtype or model_output.dtype
                noise = randn(sample.shape, generator, sample.device, dtype)
            tensors["noise"] = noise
        if sample.dtype == torch.float64:
            tensors = {name: t.double() for name, t in tensors.items()}
        more: dict[str, Any] = {}
        if program.noisy:
            more["seeds"] = self._counter_keys(seeds, sample)
        if guidance_rescale and guidance_scale is not None:
            more["factor"] = ops.guidance_factor(
                tensors["cond"], tensors["uncond"], guidance_scale, guidance_rescale
            )
        if peek is not None:
            x0 = peek(tensors, peek_table, factor=more.get("factor"))
            more["threshold"] = self._threshold(x0)
        inputs = [tensors[name] for name in program.inputs]
        step = functools.partial(ops.ode_step, inputs, table, scaled=program.scaled, **more)
        self._step_index = index + 1
        if later:
            return step(), _unchanged(inputs, lambda: step(keep=program.keep)[1])
        return step(keep=program.keep) if program.keep else (step(),)

    def _step(self, return_dict: bool, *args: Any, **more: Any) -> Any:
        """The output of a step whose rows are x0 and the next sample."""
        if not return_dict:
            return self._advance(*args, **more)
        return SchedulerOutput(*self._advance(*args, later=True, **more))

    def _mixed(
        self, what: str, row: Combination, x: Tensor, noise: Tensor, places: Tensor | int
    ) -> Tensor:
        """A mixture of data and noise whose weights are those of each sample's place, or of one."""
        if what not in self._mixtures:
            program = Program({what: row}, "x")
            self._mixtures[what] = program, Tables([program])
        program, tables = self._mixtures[what]
        table = tables.on(x.device)[0]
        if isinstance(places, Tensor):
            table = table.index_select(1, places.to(x.device).flatten())
        else:
            table = table[:, places : places + 1]
        noise = noise.expand_as(x)
        if x.dtype == torch.float64 or noise.dtype == torch.float64:
            noise = noise.to(x.dtype)
        result: Tensor = program({"x": x, "noise": noise}, table)
        return result

    def _places_of(self, timesteps: Tensor) -> Tensor | int:
        """The steps of these timesteps; where the run is, if ``set_begin_index`` was called."""
        if self._begin_index is None:
            found = [self.index_for_timestep(t) for t in timesteps.flatten().tolist()]
            return torch.tensor(found, dtype=torch.int64)
        return self._begin_index if self._step_index is None else self._step_index

    def _counter_noise(self, seeds: Any, sample: Tensor, draw: int) -> Tensor:
        """The noise that ``seeds`` stand for, as a tensor: for what one kernel does not do."""
        keys = self._counter_keys(seeds, sample)
        flat = ops.counter_normal(keys, sample[0].numel(), draw)
        return flat.view(sample.shape)

    def _of_one_kind(self, model_output: Tensor, sample: Tensor) -> tuple[str, Tensor, Tensor]:
        """Which of the two the next sample is like, and both, as one kernel takes them."""
        dtype = model_output.dtype
        if not self.like_output:
            dtype = torch.promote_types(dtype, sample.dtype)
        if torch.float64 in (model_output.dtype, sample.dtype):
            return "sample", model_output.to(dtype), sample.to(dtype)
        if dtype == model_output.dtype:
            return "output", model_output, sample
        return "sample", model_output, sample.to(dtype)

    def _threshold(self, x0: Tensor) -> Tensor:
        """Of dynamic thresholding (Saharia et al. 2022): a quantile of |x0| in each sample."""
        wide = x0 if x0.dtype == torch.float64 else x0.float()
        ratio = self.config.dynamic_thresholding_ratio
        quantile = torch.quantile(wide.flatten(1).abs(), ratio, dim=1)
        return quantile.clamp(min=1.0, max=self.config.sample_max_value)

    def _counter_keys(self, seeds: Any, sample: Tensor) -> Tensor:
        """The keys of ``seeds``, brought to the device once a run."""
        if isinstance(seeds, Tensor) and seeds.dim() == 2:
            return ops.counter_keys(seeds, sample.shape[0], sample.device)
        value = seeds if isinstance(seeds, int) else tuple(seeds)
        if isinstance(seeds, Tensor):
            value = (id(seeds), seeds._version)
        mark = (value, sample.shape[0], sample.device)
        if self._keys is None or self._keys[0] != mark:
            keys = ops.counter_keys(seeds, sample.shape[0], sample.device)
            # Held with the seeds, so that no other tensor takes their id.
            self._keys = (mark, keys, seeds)
        return self._keys[1]
