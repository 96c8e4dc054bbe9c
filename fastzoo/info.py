"""What this build of fastzoo can run here, and why not the rest."""

import dataclasses
from typing import Any

import torch

import fastzoo
from fastzoo import _native, backends
from fastzoo.ops._operator import OPERATORS, Operator


@dataclasses.dataclass(frozen=True)
class Info:
    """``str(info)`` is the table that ``fastzoo info`` prints."""

    version: str
    torch: str
    build: dict[str, Any]
    cpu_capability: str | None
    operators: dict[str, dict[str, str | None]]
    owners: dict[str, dict[str, str]]

    def __str__(self) -> str:
        lines = [f"fastzoo {self.version}, torch {self.torch}"]
        if self.build:
            lines += [f"  {key}: {value or 'no'}" for key, value in self.build.items()]
        else:
            lines.append(f"  no compiled kernels: {_native.native_missing}")
        lines.append(f"  CPU kernels run on: {self.cpu_capability or 'not built'}")
        width = max(len(name) for name in self.operators)
        lines.append("")
        lines.append(f"{'operator':{width}}  " + "  ".join(f"{b:9}" for b in backends.NAMES))
        reasons: dict[str, str] = {}
        for name, row in self.operators.items():
            cells = []
            for backend in backends.NAMES:
                reason = row[backend]
                owned = [device for device, owner in self.owners[name].items() if owner == backend]
                mark = f"auto:{'+'.join(owned)}" if owned else "yes"
                cells.append(f"{mark if reason is None else 'no':9}")
                if reason is not None and reason != f"{name} has no {backend} kernel":
                    reasons[backend] = reason
            lines.append(f"{name:{width}}  " + "  ".join(cells))
        lines += ["", *(f"{backend}: {reason}" for backend, reason in reasons.items())]
        return "\n".join(lines).rstrip()


def _why_not(operator: Operator, backend: str, devices: tuple[str, ...]) -> str | None:
    if any(operator.refusal(backend, device) is None for device in devices):
        return None
    # Built for a GPU, and there is none; or not built at all.
    return operator.refusal(backend, "cuda") or "there is no CUDA device"


def info() -> Info:
    """The build, and every operator's backends with the reason where one cannot run.

    A backend is listed as runnable if it runs on this machine's own devices: ``cuda`` and
    ``triton`` on a GPU (on CPU tensors, where the emulator or the interpreter is loaded).
    Asking whether there is a GPU initialises no CUDA context.
    """
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    operators: dict[str, dict[str, str | None]] = {}
    owners: dict[str, dict[str, str]] = {}
    for name, operator in OPERATORS.items():
        operators[name] = {}
        for backend in backends.NAMES:
            operators[name][backend] = _why_not(operator, backend, devices)
        owners[name] = {device: operator.owner(device) for device in devices}
    return Info(
        version=fastzoo.__version__,
        torch=torch.__version__,
        build=_native.facts,
        cpu_capability=_native.cpu_capability(),
        operators=operators,
        owners=owners,
    )
