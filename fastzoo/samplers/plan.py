"""From a method, written for names, to the kernel calls of a run.

A method is a generator function of one step. It yields where it wants the model and at which
sigma, gets back the state there and what the model takes the data for, and returns the next state:

    def heun(x, step):
        x, denoised = yield x, step.sigma
        slope = derivative(x, denoised, step.sigma)
        ahead = x + (step.next_sigma - step.sigma) * slope
        _, denoised = yield ahead, step.next_sigma
        ...
        return x + ...

All of these are :class:`~fastzoo.samplers.algebra.Combination`: nothing is computed but what a call
of the model needs, so that a step's end and the next one's beginning (its churn, say) are one
kernel. What a method writes of the state is expanded into the tensors that are there.
"""

import dataclasses
import inspect
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeAlias

import numpy

from fastzoo.samplers import formulas
from fastzoo.samplers.algebra import Coefficient, Combination, Program, noise, tensor

Evaluation: TypeAlias = Generator[
    tuple[Combination, Coefficient], tuple[Combination, Combination], formulas.Value
]
Method: TypeAlias = Callable[..., Evaluation]

METHODS: dict[str, Method] = {}
_DRAWS = 2
# Above the draws of noise, so that each kernel of a run rounds by words of its own.
_FIRST_ROUNDING = 1 << 30


def method(function: Method) -> Method:
    """Registers a sampler method under its name."""
    METHODS[function.__name__] = function
    return function


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """The model, at the tensor ``x`` and the noise level ``sigma``."""

    x: str
    sigma: Coefficient
    outputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Compute:
    """One kernel; ``results`` name the program's last row and those kept."""

    program: Program
    results: tuple[str, ...]
    scaled_by: str | None


@dataclasses.dataclass(frozen=True)
class Draw:
    """Noise from the user's sampler, between two noise levels."""

    name: str
    sigma: Coefficient
    next_sigma: Coefficient


@dataclasses.dataclass(frozen=True)
class Report:
    """The user's callback."""

    index: int
    sigma: Coefficient
    sigma_hat: Coefficient
    x: str
    denoised: str


Instruction: TypeAlias = Evaluate | Compute | Draw | Report


class Step:
    """What a method knows of its step.

    Attributes:
        index: of the step.
        sigma, next_sigma: where it begins and ends, numbers or arrays ``[B]``.
        sigmas: of the whole run.
        memory: what the method keeps from step to step, empty at the beginning.
    """

    def __init__(self, trace: "Trace", index: int, memory: dict[str, Any]) -> None:
        self._trace = trace
        self._draws = 0
        self.index = index
        self.sigmas = trace.sigmas
        self.sigma, self.next_sigma = trace.sigmas[index], trace.sigmas[index + 1]
        self.memory = memory

    @property
    def last(self) -> bool:
        """Whether it ends without noise."""
        return bool(numpy.all(numpy.asarray(self.next_sigma) == 0))

    def noise(self, sigma: Coefficient, next_sigma: Coefficient) -> Combination:
        """Standard normal noise for going from one noise level to another."""
        if self._draws == _DRAWS:
            raise RuntimeError(f"a step draws at most {_DRAWS} noises")
        number = 1 + _DRAWS * self.index + self._draws
        self._draws += 1
        return self._trace.noise(number, sigma, next_sigma)

    def keep(self, value: Combination) -> Combination:
        """The value as a tensor of its own, which later steps can use: the next kernel writes it
        beside its result. A tensor is kept as it is."""
        return self._trace.keep(value)


class Trace:
    """The instructions of a run, found by running its method on names.

    Args:
        method: of :data:`METHODS`.
        options: its keyword arguments.
        sigmas: noise levels from the first to the last, numbers or arrays ``[B]``.
        prediction: what the model returns; see :func:`fastzoo.samplers.formulas.denoised`.
        guidance_scale: the model returns an unconditional and a conditional prediction, which are
            combined by this scale. None: it returns one.
        rescaled: whether guidance is multiplied by its factor.
        counter: noise is made by counter inside the kernels; otherwise drawn before them.
        reports: the state and the denoised of every step are wanted.
    """

    def __init__(
        self,
        method: str,
        options: dict[str, Any],
        sigmas: Sequence[Coefficient],
        *,
        prediction: str = "denoised",
        sigma_data: float = 0.5,
        guidance_scale: Coefficient | None = None,
        rescaled: bool = False,
        counter: bool = True,
        reports: bool = False,
    ) -> None:
        function = METHODS.get(method)
        if function is None:
            raise ValueError(f"method: expected one of {sorted(METHODS)}, got {method!r}")
        known = list(inspect.signature(function).parameters)[2:]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise TypeError(f"{unknown[0]}: {method} takes {known or 'no options'}")
        self.sigmas = list(sigmas)
        self.instructions: list[Instruction] = []
        self._prediction, self._sigma_data = prediction, sigma_data
        self._guidance, self._rescaled, self._counter = guidance_scale, rescaled, counter
        self._pending: dict[str, Combination] = {}
        self._factor: str | None = None
        self._outputs: tuple[str, ...] = ()
        self._state, self._states = "x", {"x"}
        self._names = 0

        x, memory = tensor("x"), dict[str, Any]()
        for index in range(len(self.sigmas) - 1):
            step = Step(self, index, memory)
            if x.noisy:
                # One kernel draws one noise.
                x = self._materialised(x)
            generator, evaluations = function(x, step, **options), 0
            try:
                wanted, sigma = next(generator)
                while True:
                    at, value = self._evaluated(wanted, sigma, fresh=evaluations == 0)
                    if reports and evaluations == 0:
                        self._report(step, sigma, at, value)
                    evaluations += 1
                    wanted, sigma = generator.send((at, value))
            except StopIteration as end:
                x = end.value
        self.result = self._name_of(self._materialised(x))
        self._leave_unread()

    def noise(self, number: int, sigma: Coefficient, next_sigma: Coefficient) -> Combination:
        if self._prediction == "velocity":
            raise ValueError(
                "prediction: a rectified flow takes a method that draws no noise; the amounts of "
                "these are for data left unscaled"
            )
        if self._counter:
            return noise(number)
        name = self._name("noise")
        self.instructions.append(Draw(name, sigma, next_sigma))
        return tensor(name)

    def keep(self, value: Combination) -> Combination:
        if self._plain(value):
            return value
        name = self._name("kept")
        self._pending[name] = value
        return tensor(name)

    def _evaluated(
        self, wanted: Combination, sigma: Coefficient, *, fresh: bool
    ) -> tuple[Combination, Combination]:
        """The state as a tensor, and what the model takes the data for there. A stage of a step
        says it in the tensors of the step, which its end reads anyway."""
        x = self._materialised(wanted)
        stage = x if fresh or wanted.noisy else wanted
        name = self._name("output")
        outputs = (name,) if self._guidance is None else (f"{name}-uncond", f"{name}-cond")
        self.instructions.append(Evaluate(self._name_of(x), sigma, outputs))
        if self._guidance is None:
            return x, self._denoised(stage, tensor(name), sigma)
        uncond, cond = (tensor(output) for output in outputs)
        guided = formulas.guided(uncond, cond, self._guidance)
        if self._rescaled:
            self._factor, self._outputs = name, outputs
        # Kept: two tensors become one, and no two factors meet in a kernel.
        return x, self.keep(self._denoised(stage, guided, sigma))

    def _denoised(self, x: Combination, output: Combination, sigma: Coefficient) -> Combination:
        alpha: Coefficient = 1.0
        if self._prediction == "v":
            # The network sees a variance preserving state.
            alpha = 1 / numpy.sqrt(1 + sigma**2)
            x, sigma = alpha * x, alpha * sigma
        elif self._prediction == "velocity":
            alpha = 1 - sigma
        value: Combination = formulas.denoised(
            self._prediction, x, output, alpha, sigma, self._sigma_data
        )
        return value

    def _materialised(self, value: Combination) -> Combination:
        """The value as a tensor, by one kernel, which writes what is to be kept too."""
        rows = dict(self._pending)
        if self._plain(value) and self._name_of(value) not in rows:
            # What is kept waits for a kernel that has something to compute.
            return value
        name = self._name("x")
        if self._plain(value) and self._name_of(value) == list(rows)[-1]:
            # What is to be kept is the result itself.
            name, value = rows.popitem()
        kept = tuple(rows)
        rows[name] = value
        terms = [term for row in rows.values() for term in row.terms if isinstance(term, str)]
        scaled = [o for o in self._outputs if o in terms] if self._factor else []
        # The first tensor has the state's dtype: one that is read if there is one.
        like = next((t for t in terms if t in self._states), self._state)
        draw = _FIRST_ROUNDING + len(self.instructions)
        program = Program(rows, like, keep=kept, scaled=scaled, draw=draw)
        factor = self._factor if scaled else None
        self.instructions.append(Compute(program, (name, *kept), factor))
        self._pending, self._factor, self._state = {}, None, name
        self._states.add(name)
        return tensor(name)

    def _leave_unread(self) -> None:
        """Rows that were to be kept, and that nothing reads, are not written."""
        read = {self.result}
        for i, instruction in reversed(list(enumerate(self.instructions))):
            if isinstance(instruction, Compute):
                name, *kept = instruction.results
                kept = [row for row in kept if row in read]
                instruction.program.keep_only(kept)
                self.instructions[i] = dataclasses.replace(instruction, results=(name, *kept))
                read.update(instruction.program.inputs)
            elif isinstance(instruction, Evaluate):
                read.add(instruction.x)
            elif isinstance(instruction, Report):
                read.update((instruction.x, instruction.denoised))

    def _report(self, step: Step, sigma: Coefficient, x: Combination, value: Combination) -> None:
        shown = self._name_of(self._materialised(value))
        self.instructions.append(Report(step.index, step.sigma, sigma, self._name_of(x), shown))

    def _name(self, kind: str) -> str:
        self._names += 1
        return f"{kind}-{self._names}"

    @staticmethod
    def _plain(value: Combination) -> bool:
        (factor, *more) = value.terms.values() or (0.0,)
        return not more and numpy.ndim(factor) == 0 and factor == 1 and not value.noisy

    @staticmethod
    def _name_of(value: Combination) -> str:
        (name,) = value.terms
        return str(name)
