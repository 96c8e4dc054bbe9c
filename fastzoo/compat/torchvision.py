"""torchvision's operators on fastzoo's kernels.

``nms`` is a drop-in for ``torchvision.ops.nms``. :func:`enable` instead replaces the kernels of the
operator ``torchvision::nms``, so that code which imported torchvision's function before (and
torchvision's own ``batched_nms`` and detection models) runs on fastzoo too, unchanged.
"""

import importlib
import warnings

import torch
from torch import Tensor

from fastzoo import ops
from fastzoo.ops._operator import OPERATORS

_REPLACED_ON = {"cpu": "CPU", "cuda": "CUDA"}
_library: torch.library.Library | None = None


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """``torchvision.ops.nms``: see :func:`fastzoo.ops.nms`, which has the same answers."""
    return ops.nms(boxes, scores, iou_threshold)


def enable() -> None:
    """Run ``torchvision::nms`` on fastzoo, process-wide, until :func:`disable`.

    A device type on which fastzoo would only have its reference keeps torchvision's kernel.
    Calling it again changes nothing.

    Raises:
        RuntimeError: torchvision is not installed or lacks its compiled operators, or fastzoo has
            no kernel to put in their place.
    """
    global _library
    if _library is not None:
        return
    try:
        importlib.import_module("torchvision")
    except ImportError as error:
        raise RuntimeError(
            f"fastzoo.compat.torchvision: {error} (pip install torchvision)"
        ) from error
    if not hasattr(torch.ops.torchvision, "nms"):
        raise RuntimeError(
            "fastzoo.compat.torchvision: this torchvision was imported without its compiled "
            "operators: there is no torchvision::nms to replace"
        )
    operator = OPERATORS["nms"]
    keys = [key for device, key in _REPLACED_ON.items() if operator.owner(device) != "reference"]
    if not keys:
        raise RuntimeError(
            "fastzoo.compat.torchvision: no kernel to replace torchvision's with: "
            f"{operator.refusal('cpu', 'cpu')}"
        )
    _library = torch.library.Library("torchvision", "IMPL")
    with warnings.catch_warnings():
        # torch warns that a kernel is overridden: that is what was asked for.
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        for key in keys:
            _library.impl("nms", nms, key, allow_override=True)


def disable() -> None:
    """Give ``torchvision::nms`` its own kernels back."""
    global _library
    if _library is not None:
        _library._destroy()
        _library = None
