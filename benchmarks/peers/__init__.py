"""Other implementations, one file each, all optional: one that cannot run says why."""

from benchmarks.implementation import Implementation
from benchmarks.peers import (
    cdist,
    eager,
    faiss,
    opencv,
    scalar_nms,
    torch_compile,
    torchvision,
)

PEERS: tuple[Implementation, ...] = tuple(
    module.PEER for module in (scalar_nms, torchvision, opencv, faiss, cdist, eager, torch_compile)
)
