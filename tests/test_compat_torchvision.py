"""torchvision's operator on fastzoo's kernels, with a stand-in for torchvision.

There is no torchvision to test with on every machine, so a process of its own defines what
torchvision would: the operator ``torchvision::nms`` with a kernel, and a Python function that calls
it. The stand-in's kernel answers with an index that no NMS gives.
"""

import subprocess
import sys

import pytest
import torch

import fastzoo
from fastzoo.compat import torchvision as compat
from tests.conftest import ROOT

STAND_IN = """
import sys, types, warnings
import torch
warnings.simplefilter("error")
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.impl("nms", lambda dets, scores, iou_threshold: torch.tensor([-1]), "CPU")
sys.modules["torchvision"] = types.ModuleType("torchvision")

def nms(boxes, scores, iou_threshold):
    return torch.ops.torchvision.nms(boxes, scores, iou_threshold)

early_bound = nms
boxes = torch.tensor([[0., 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]])
scores = torch.tensor([.5, .9, .1])
def answer(): return early_bound(boxes, scores, 0.5).tolist()

from fastzoo.compat import torchvision as compat
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", STAND_IN + code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nms_is_fastzoos() -> None:
    boxes, scores = torch.rand(50, 4).cumsum(1), torch.rand(50)
    assert torch.equal(compat.nms(boxes, scores, 0.5), fastzoo.ops.nms(boxes, scores, 0.5))


def test_early_bound_callers_get_our_kernel_and_then_their_own_again() -> None:
    run("""
assert answer() == [-1]
for _ in range(2):
    compat.enable()
    assert answer() == [1, 2]
    compat.enable()  # a second time changes nothing
    assert answer() == [1, 2]
    compat.disable()
    assert answer() == [-1]
    compat.disable()
    assert answer() == [-1]
""")


def test_use_backend_and_our_checks_apply() -> None:
    run("""
import fastzoo
from fastzoo.ops._operator import OPERATORS
compat.enable()
OPERATORS["nms"].overloads["reference"] = lambda *_: torch.tensor([5])
with fastzoo.use_backend("reference"):
    assert answer() == [5]
try:
    early_bound(boxes[:, :3], scores, 0.5)
except ValueError as error:
    assert str(error).startswith("boxes: expected shape [N, 4]"), error
else:
    raise AssertionError("three columns were taken for boxes")
""")


def test_boxes_that_require_gradients_are_taken() -> None:
    run("""
compat.enable()
boxes.requires_grad_()
assert answer() == [1, 2]
""")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("del sys.modules['torchvision']; sys.modules['torchvision'] = None", "pip install"),
        ("library._destroy()", "without its compiled operators"),
        (
            "from fastzoo.ops._operator import OPERATORS\n"
            "OPERATORS['nms'].owner = lambda device: 'reference'",
            "no kernel to replace torchvision's with",
        ),
    ],
)
def test_enable_says_why_it_cannot(change: str, message: str) -> None:
    said = run(f"""
{change}
try:
    compat.enable()
except RuntimeError as error:
    print(error)
compat.disable()
""")
    assert said.startswith("fastzoo.compat.torchvision: ")
    assert message in said
