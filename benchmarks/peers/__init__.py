"""Other implementations, one file each, all optional: one that cannot run says why."""

from benchmarks.implementation import Implementation
from benchmarks.peers import (
    cdist,
    classes,
    eager,
    faiss,
    linear_cross_entropy,
    metric_learning,
    opencv,
    partial_fc,
    scalar,
    scipy,
    sklearn,
    torch_cluster,
    torch_compile,
    torchvision,
    vector_quantize,
    zuko,
)

PEERS: tuple[Implementation, ...] = (
    scalar.PEER,
    classes.TRICK,
    classes.LOOP,
    torchvision.PEER,
    opencv.PEER,
    faiss.PEER,
    scipy.PEER,
    torch_cluster.PEER,
    sklearn.PEER,
    vector_quantize.PEER,
    cdist.PEER,
    metric_learning.PEER,
    zuko.PEER,
    zuko.COMPILED,
    partial_fc.PEER,
    partial_fc.TENTH,
    linear_cross_entropy.PEER,
    eager.PEER,
    torch_compile.PEER,
    eager.FLOAT32,
)
