"""The answer that a row must give, and how near another answer comes to it."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import samplers
from benchmarks.workloads import COMMITMENT, DECAY, EPS, MEASURED
from fastzoo import ops, reference
from fastzoo.reference.boxes import box_area, box_intersection
from fastzoo.reference.clouds import rows_at
from fastzoo.reference.density import density_with, kernel_density_rows
from fastzoo.reference.margin_softmax import margin_softmax_target, per_row
from fastzoo.reference.neighbours import distance_matrix, neighbour_search
from fastzoo.reference.nms import box_iou_with, falling_order, round_down, soft_decay
from fastzoo.testing import SPECS
from fastzoo.testing.losses import deviation, leaves, loss_and_gradients

_ROWS = 1024
_CLASSES = 8192
_MANY_BOXES = 50_000
_MANY_POINTS = 20_000
# exp(-u) of no more than this is nothing beside 1, however many there are of them.
_NEGLIGIBLE = 50.0
# A lowered score has a rounding for each box that lowered it, and a cancellation in 1 - overlap.
_SCORE_TOLERANCE = 1e-3
_INERTIA_TOLERANCE = 1e-3
_SUM_TOLERANCE = 1e-5


def vq_nearest(x: Tensor, codebook: Tensor, *, metric: str = "l2", **_: Any) -> Tensor:
    """The definition's answer, found with a float64 matrix product.

    The product's score ``x c - |c|^2 / 2`` and half of the definition's, less ``|x|^2 / 2``, are
    sums of at most ``D + 4`` terms, whose magnitudes add up to no more than ``(|x| + |c|)^2``: they
    differ by at most the bound below, and so do both scores ``x c / |c|`` of a cosine. Where only
    one code is within twice the bound of the best, it is the answer; the other rows go through the
    definition.
    """
    rows, codes = x.cpu().double(), codebook.cpu().double()
    factors, shift = codes, -codes.square().sum(1) / 2
    norm = codes.square().sum(1).max().sqrt()
    if metric == "cosine":
        factors, shift = F.normalize(codes), torch.zeros_like(shift)
        norm = torch.ones(()).double()
    chosen, alone = [], []
    for part in rows.split(_ROWS):
        scores = torch.addmm(shift, part, factors.t())
        best, index = scores.max(1)
        largest = (part.square().sum(1).sqrt() + norm).square()
        bound = 2 * (codes.shape[1] + 4) * 2.0**-53 * largest
        chosen.append(index)
        alone.append((scores >= (best - 2 * bound)[:, None]).sum(1) == 1)
    indices, decided = torch.cat(chosen), torch.cat(alone)
    if not decided.all():
        close: Any = reference.vq_nearest(rows[~decided], codes, metric=metric)
        indices[~decided] = close
    return indices


def vq_quantize(
    x: Tensor, codebook: Tensor, grad: Tensor, *, beta: float = 0.25
) -> tuple[Tensor, ...]:
    """The loss, the codes, and the gradients straight through, in float64 with known indices."""
    rows, codes = _double_leaf(x), _double_leaf(codebook)
    chosen = codes[vq_nearest(x, codebook).to(x.device)]
    loss = (chosen - rows.detach()).square().mean()
    loss = loss + beta * (rows - chosen.detach()).square().mean()
    quantized = rows + (chosen - rows).detach()
    gradients = torch.autograd.grad((loss, quantized), (rows, codes), (None, grad.double()))
    return loss.detach(), chosen.detach(), *gradients


def vector_quantize(x: Tensor, codebook: Tensor, grad: Tensor, **_: Any) -> tuple[Tensor, ...]:
    """A step of training in float64: the loss, the codes, the codebook after the moving averages
    of a new module have taken in the vectors, and the gradient of these."""
    rows, codes = _double_leaf(x), codebook.detach().double()
    indices = vq_nearest(x.detach().flatten(0, -2), codebook).to(x.device)
    chosen = codes[indices].view(x.shape)
    loss = COMMITMENT * (rows - chosen).square().mean()
    gradient = torch.autograd.grad((loss, rows), rows, (None, grad.double()))
    counts, sums = reference.vq_statistics(rows.detach().flatten(0, -2), indices, len(codes))
    size = DECAY + (1 - DECAY) * counts
    average = DECAY * codes + (1 - DECAY) * sums
    smoothed = (size + EPS) / (size.sum() + len(codes) * EPS) * size.sum()
    return loss.detach(), chosen, average / smoothed[:, None], *gradient


def vector_quantize_eval(x: Tensor, codebook: Tensor, *_: Any, **__: Any) -> Tensor:
    return codebook[vq_nearest(x.flatten(0, -2), codebook)].view(x.shape)


def kmeans(x: Tensor, initial: Tensor, *, iters: int) -> Tensor:
    """The inertia after so many rounds in float64; a centroid without points stays."""
    points, centroids = x.double(), initial.double()
    for _ in range(iters):
        counts, sums = reference.vq_statistics(points, vq_nearest(x, centroids), len(initial))
        centroids = torch.where(counts[:, None] > 0, sums / counts[:, None], centroids)
    return _inertia(x, centroids)


def _inertia(x: Tensor, centroids: Tensor) -> Tensor:
    wide = centroids.double()
    return (x.double() - wide[vq_nearest(x, wide)]).square().sum()


def _double_leaf(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_()


def margin_softmax_loss(
    x: Tensor, w: Tensor, y: Tensor, *, margin: ops.Margin, grad: str = "exact"
) -> tuple[Tensor, ...]:
    """The loss and the gradients of ``x`` and ``w``, in float64 a chunk of classes at a time.

    Of a margin that normalises both, whose state and other classes' scores it leaves alone. With
    the log-sum-exp known, a chunk's share of the gradient is that of its probabilities, held
    constant, times its scores.
    """
    s, n = margin.default_scale, len(x)
    own_w, wide_x = _double_leaf(w[y]), _double_leaf(x)
    unit = F.normalize(wide_x)

    def scores(start: int, part: Tensor) -> Tensor:
        place = (y - start)[:, None]
        mine = torch.arange(len(part), device=y.device) == place
        return (s * unit @ F.normalize(part).t()).masked_fill(mine, -torch.inf)

    lse = torch.full_like(unit[:, 0], -torch.inf)
    with torch.no_grad():
        for start, part in _chunks(w):
            lse = lse.logaddexp(scores(start, part.double()).logsumexp(1))
    cosine = (unit * F.normalize(own_w)).sum(1)
    rule, *numbers = margin.terms(x.detach().double().norm(dim=1), cosine.new_zeros(0))
    m1, m2, m3 = (per_row(m, cosine) for m in numbers)
    value = margin_softmax_target(cosine, m1, m2, m3, rule)
    if grad == "insightface":
        value = cosine + (value - cosine).detach()
    rows = (lse - s * value).exp().log1p()
    own = (lse - s * value.detach()).sigmoid() / n  # what a row's gradient of lse is
    grad_x, grad_own = torch.autograd.grad(rows.mean(), (wide_x, own_w), retain_graph=True)
    grad_w = torch.empty(w.shape, device=w.device)
    for start, part in _chunks(w):
        wide_w = _double_leaf(part)
        z = scores(start, wide_w)
        p = (z.detach() - lse[:, None]).exp() * own[:, None]
        total = (p * z.masked_fill(z == -torch.inf, 0)).sum()
        by_x, by_w = torch.autograd.grad(total, (wide_x, wide_w), retain_graph=True)
        grad_x = grad_x + by_x
        mine = (y >= start) & (y < start + len(part))
        by_w.index_add_(0, y[mine] - start, grad_own[mine])
        grad_w[start : start + len(part)] = by_w
    return rows.mean().detach(), grad_x, grad_w


def _chunks(w: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(w), _CLASSES):
        yield start, w.detach()[start : start + _CLASSES]


def clip_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> tuple[Tensor, ...]:
    """The loss and its gradients, in float64 a part of the rows at a time."""
    image, text, scale = (_double_leaf(t) for t in (image, text, logit_scale))
    n = len(image)
    row, column = [], torch.full_like(text[:, 0], -torch.inf).detach()
    with torch.no_grad():
        for part in image.split(_ROWS):
            z = scale * part @ text.t()
            row.append(z.logsumexp(1))
            column = column.logaddexp(z.logsumexp(0))
    own = scale * (image * text).sum(1)
    loss = ((torch.cat(row) + column) / 2 - own).mean().detach()
    wanted = (image, text, scale)
    total = torch.autograd.grad(-own.mean(), wanted)
    for start in range(0, n, _ROWS):
        z = scale * image[start : start + _ROWS] @ text.t()
        by_row = (z - row[start // _ROWS][:, None]).exp()
        p = (by_row + (z - column).exp()).detach() / (2 * n)
        share = torch.autograd.grad((p * z).sum(), wanted)
        total = tuple(a + b for a, b in zip(total, share, strict=True))
    return loss, *total


def spline_flow(x: Tensor, *parameters: Tensor, passes: int) -> tuple[Tensor, ...]:
    """The loss of a step and its gradients, in float64, as one writes it."""
    wide = tuple(_double_leaf(p) for p in parameters)
    call = functools.partial(MEASURED["SplineFlow"].eager, x.double(), *wide, passes=passes)
    return loss_and_gradients(call, wide)()


def maf_inverse(z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Feature after feature, in float64."""
    wide = (t.double() for t in (z, *parameters))
    found: tuple[Tensor, Tensor] = MEASURED["MAF"].eager(*wide)
    return found


def _by_counter(like: Tensor, seeds: int | Tensor, draw: int) -> Tensor:
    keys = ops.counter_keys(seeds, len(like))
    found = reference.counter_normals(keys, like[0].numel(), draw)
    return found.double().view(like.shape)


def scheduler_step(*args: Tensor, scheduler: str, noise: str | None) -> Any:
    """The formulas in float64."""
    step = samplers.SCHEDULERS[scheduler]
    tensors = dict(zip(step.inputs, (t.double() for t in args), strict=True))
    if noise == "seeds":
        tensors["noise"] = _by_counter(args[0], torch.arange(len(args[0])), step.index + 1)
    return samplers.evaluated(step, tensors)


def guided_step(*args: Tensor) -> Tensor:
    found: Tensor = MEASURED["guided_step"].eager(*(t.double() for t in args))
    return found


def sample(
    x: Tensor, outputs: Tensor, sigmas: Tensor, drawn: Tensor, *, method: str, noise: str | None
) -> Tensor:
    """The run as its paper writes it, in float64."""

    def draw(i: int) -> Tensor:
        return (
            drawn[i].double() if noise == "generator" else _by_counter(x, samplers.SEED, 1 + 2 * i)
        )

    return samplers.run(x.double(), outputs.double(), sigmas, method, draw)


def odeint(y0: Tensor) -> Tensor:
    return y0.double() * math.exp(math.sin(samplers.END))


def denoising_step(x: Tensor) -> Tensor:
    found: Tensor = MEASURED["denoising_step"].eager(x.double())
    return found


def layer_over_points(op: str, features: Tensor, grad: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """A step of training in float64, as one writes it."""
    args = tuple(
        (_double_leaf(t) if t.requires_grad else t.double()) if t.is_floating_point() else t
        for t in (features, grad, *rest)
    )
    call = functools.partial(MEASURED[op].eager, *args)
    return loss_and_gradients(call, leaves(args), seeds=(args[1],))()


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """The definition's answer: of many boxes, only near ones are compared.

    Boxes that overlap have their first corners no farther apart than the longest side is: in the
    same cell of a grid of that pitch, or in neighbouring ones. What overlaps more than the
    threshold, by the definition's arithmetic, is then gone through by falling score.
    """
    if len(boxes) < _MANY_BOXES:
        return reference.nms(boxes, scores, iou_threshold)
    order = falling_order(scores)
    corner = boxes[order, :2].double()
    pitch = (boxes[order, 2:].double() - corner).max()
    column, row = ((corner - corner.amin(0)) / pitch).long().add(1).unbind(1)
    width = int(column.max()) + 2
    # By cell from here on, so that a box's neighbours lie together; rank is that of the score.
    cell, rank = (row * width + column).sort()
    boxes = boxes[order[rank]]
    sides = [(boxes[:, axis].contiguous(), boxes[:, axis + 2].contiguous()) for axis in (0, 1)]
    first, second = [], []
    for shift in (0, 1, width - 1, width, width + 1):  # each pair of cells once
        begin = torch.searchsorted(cell, cell + shift)
        count = torch.searchsorted(cell, cell + shift, right=True) - begin
        for part in torch.arange(len(boxes)).split(_ROWS << 5):
            a = part.repeat_interleave(count[part])
            start = (begin[part] - count[part].cumsum(0) + count[part])[a - part[0]]
            b = start + torch.arange(len(a))
            for low, high in sides:
                both = (low[a] < high[b]) & (low[b] < high[a])
                a, b = a[both], b[both]
            intersection = box_intersection(boxes[a], boxes[b])
            overlap = intersection / (box_area(boxes[a]) + box_area(boxes[b]) - intersection)
            near = (overlap > round_down(iou_threshold, boxes.dtype)) & (a != b)
            first.append(torch.minimum(rank[a[near]], rank[b[near]]))
            second.append(torch.maximum(rank[a[near]], rank[b[near]]))
    better, worse = torch.cat(first), torch.cat(second)
    by_better = better.argsort()
    suppressed, worse_of = bytearray(len(boxes)), worse[by_better].tolist()
    starts = torch.searchsorted(better[by_better], torch.arange(len(boxes) + 1)).tolist()
    for i in range(len(boxes)):
        if not suppressed[i]:
            for j in worse_of[starts[i] : starts[i + 1]]:
                suppressed[j] = 1
    return order[torch.frombuffer(suppressed, dtype=torch.uint8) == 0]


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    method: str = "linear",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
) -> tuple[Tensor, Tensor]:
    """The definition's sequence, where only what overlaps the box that is taken is touched."""
    left = scores.clone()
    keep: list[Tensor] = []
    taken: list[Tensor] = []
    while True:
        best, i = left.max(0)
        if not best.double() > score_threshold:
            return torch.stack(keep), torch.stack(taken)
        keep.append(i)
        taken.append(best)
        left[i] = -torch.inf
        overlap = box_iou_with(boxes[i], boxes)
        touched = ((overlap > 0) & (left > 0)).nonzero()[:, 0]
        left[touched] *= soft_decay(overlap[touched], method, iou_threshold, sigma)


def multiclass_nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    score_threshold: float,
    iou_threshold: float,
    max_detections: int,
    pre_top_k: int | None = None,
) -> tuple[Tensor, ...]:
    """The definition's answer, which ends at the last detection wanted, and not at the last box."""
    images, _, classes = scores.shape
    num = torch.zeros(images, dtype=torch.int64)
    found = torch.zeros(images, max_detections, 4), torch.zeros(images, max_detections)
    labels, indices = torch.full((2, images, max_detections), -1)
    limit = round_down(iou_threshold, boxes.dtype)
    for image in range(images):
        flat = scores[image].flatten()
        order = falling_order(flat)
        order = order[flat[order].double() > score_threshold][:pre_top_k]
        kept: list[Tensor] = [boxes.new_empty(0, 4)] * classes
        n = 0
        for candidate in order.tolist():
            if n == max_detections:
                break
            place, label = divmod(candidate, classes)
            box = boxes[image, place]
            if (box_iou_with(box, kept[label]) > limit).any():
                continue
            kept[label] = torch.cat([kept[label], box[None]])
            found[0][image, n], found[1][image, n] = box, flat[candidate]
            labels[image, n], indices[image, n] = label, place
            n += 1
        num[image] = n
    return num, *found, labels, indices


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """The definition, some rows at a time."""
    definition = SPECS["box_iou"].definition
    return torch.cat([definition(part, boxes2) for part in boxes1.split(_ROWS // 8)])


def _cells(points: Tensor, pitch: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each cell of a grid, the rows in it and, ascending, those in it and in its neighbours:
    among these are all that are nearer than ``pitch``."""
    cells = ((points.double() - points.double().amin(0)) / pitch).long() + 1
    extent = cells.amax(0) + 2
    step = extent.flip(0).cumprod(0).flip(0).roll(-1)
    step[-1] = 1
    code, order = (cells * step).sum(1).sort()
    # The cells before and after it along the last dimension lie beside it in the order.
    shifts = itertools.product((-1, 0, 1), repeat=points.shape[1] - 1)
    strips = torch.tensor([*shifts], dtype=torch.int64) @ step[:-1]
    occupied, count = code.unique_consecutive(return_counts=True)
    begin = torch.searchsorted(code, occupied[:, None] + strips - 1).tolist()
    end = torch.searchsorted(code, occupied[:, None] + strips + 1, right=True).tolist()
    for rows, firsts, lasts in zip(order.split(count.tolist()), begin, end, strict=True):
        near = [order[first:last] for first, last in zip(firsts, lasts, strict=True)]
        yield rows, torch.cat(near).sort().values


def _whole(points: Tensor) -> Tensor:
    """The range of one cloud."""
    return torch.tensor([[0, len(points)]])


def knn_points(
    p1: Tensor, p2: Tensor, lengths1: None, lengths2: None, norm: int, k: int
) -> tuple[Tensor, ...]:
    """The definition's answer: of a large cloud, each cell's points are searched for near it, and
    for a point whose k-th is not surely near, everywhere."""
    if p1.shape[1] < _MANY_POINTS:
        right: tuple[Tensor, ...] = SPECS["knn_points"].definition(p1, p2, None, None, norm, k)
        return right
    points = p1[0]
    # So wide that a ball of this radius holds about three times k of them.
    volume = float((points.amax(0) - points.amin(0)).prod()) * 3 * k / len(points)
    pitch = (volume / (4 / 3 * math.pi)) ** (1 / points.shape[1])
    dists = points.new_full((len(points), k), torch.inf)
    indices = torch.zeros(len(points), k, dtype=torch.int64)

    def search(rows: Tensor, near: Tensor) -> None:
        queries, others = points[rows], points[near]
        ranges = _whole(queries), _whole(others)
        found = neighbour_search(queries, others, *ranges, len(near), k, math.inf, "nearest", norm)
        dists[rows], indices[rows] = found[0], near[found[1]]

    for rows, near in _cells(points, pitch):
        if len(near) >= k:
            search(rows, near)
    unsure = (dists[:, -1].double() >= (0.999 * pitch) ** 2).nonzero()[:, 0]
    for rows in unsure.split(_ROWS):
        search(rows, torch.arange(len(points)))
    return dists[None], indices[None]


def sample_farthest_points(points: Tensor, _: None, k: int) -> tuple[Tensor, ...]:
    """The definition's answer: of a large cloud, the points are in the order of x, and a new one is
    compared with those alone that are no farther along x than the farthest point is near."""
    if points.shape[1] < _MANY_POINTS:
        right: tuple[Tensor, ...] = SPECS["sample_farthest_points"].definition(points, None, k)
        return right
    x, order = points[0, :, 0].sort()
    rows = points[0, order]
    least = torch.full_like(x, torch.inf)
    latest = int((order == 0).nonzero())
    chosen = []
    for _step in range(k):
        chosen.append(int(order[latest]))
        reach = float(least.max()) ** 0.5 * 1.0001
        ends = torch.stack([x[latest] - reach, x[latest] + reach])
        begin, end = torch.searchsorted(x, ends).tolist()
        distance = distance_matrix(rows[begin:end], rows[latest : latest + 1])[:, 0]
        least[begin:end] = torch.minimum(least[begin:end], distance)
        least[latest] = -1
        farthest = (least == least.max()).nonzero()[:, 0]
        latest = int(farthest[order[farthest].argmin()])
    idx = torch.tensor([chosen])
    return rows_at(points, idx[..., None])[:, :, 0], idx


def kernel_density(points: Tensor, bandwidth: float) -> Tensor:
    """The definition's answer in float64, of a large cloud without what is negligible."""
    if points.shape[1] < _MANY_POINTS:
        right: Tensor = SPECS["kernel_density"].definition(points, bandwidth)
        return right

    def sums(queries: Tensor, others: Tensor, scale: Tensor, weight: Tensor, *_: Any) -> Tensor:
        found = torch.zeros_like(weight)
        for rows, near in _cells(queries, bandwidth * math.sqrt(2 * _NEGLIGIBLE)):
            own, near_own = queries[rows], others[near]
            ranges = _whole(own), _whole(near_own)
            found[rows] = kernel_density_rows(
                own, near_own, scale[near], weight[near], *ranges, len(near), "gaussian"
            )
        return found

    return density_with(sums, rows_at, points.double(), bandwidth).to(points.dtype)


# Where the definition itself would take minutes, or many times the memory.
_FAST: dict[str, Callable[..., Any]] = {
    "vq_nearest": vq_nearest,
    "VectorQuantize": vector_quantize_eval,
    "kmeans": kmeans,
    "nms": nms,
    "soft_nms": soft_nms,
    "multiclass_nms": multiclass_nms,
    "box_iou": box_iou,
    "knn_points": knn_points,
    "sample_farthest_points": sample_farthest_points,
    "kernel_density": kernel_density,
    "MAF": maf_inverse,
    "scheduler_step": scheduler_step,
    "guided_step": guided_step,
    "sample": sample,
    "odeint": odeint,
    "denoising_step": denoising_step,
}
_FAST_LOSSES: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "margin_softmax_loss": margin_softmax_loss,
    "clip_loss": clip_loss,
    "vq_quantize": vq_quantize,
    "VectorQuantize": vector_quantize,
    "EdgeConv": functools.partial(layer_over_points, "EdgeConv"),
    "PointConv": functools.partial(layer_over_points, "PointConv"),
    "SplineFlow": spline_flow,
}


def expected(op: str, *args: Any, **kwargs: Any) -> Any:
    """The definition's answer, on the CPU."""
    moved = [a.cpu() if isinstance(a, Tensor) else a for a in args]
    find = _FAST.get(op) or SPECS[op].definition
    return find(*moved, **kwargs)


def expected_loss(
    op: str, *args: Any, seeds: tuple[Tensor | None, ...] = (None,), **kwargs: Any
) -> tuple[Tensor, ...]:
    """The loss that the definition has in float64, and its gradients, on the arguments' device.

    ``seeds`` is what the backward starts from where the result is no scalar and no argument has it.
    """
    if op in _FAST_LOSSES:
        return _FAST_LOSSES[op](*args, **kwargs)
    definition = functools.partial(SPECS[op].definition, *args, **kwargs)
    return loss_and_gradients(definition, leaves(args), seeds=seeds)()


def compare(
    op: str,
    answer: Any,
    right: Any,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> tuple[bool, float]:
    """Whether an answer is right bit for bit, and the share of it that is right.

    Overlaps are right within the tolerance of their operator for ``args``, a fast lookup within
    that of its precision, and centroids where their inertia is within a thousandth of the right
    one. Random numbers of a peer are right where they are distributed alike. A neighbour of a peer
    is right where it is as near as the right one, in a ball where it is inside; its voxels may have
    other numbers. The share of what is found (boxes, detections, peaks) is taken of sets, since
    peers may order equal scores in another way and leave out the padding; one whose score is off is
    not right.
    """
    if op == "kmeans":
        found = _inertia(args[0].cpu(), torch.as_tensor(answer).cpu())
        near = math.isclose(found, right, rel_tol=_INERTIA_TOLERANCE)
        return near, float(near)
    if op == "vq_statistics":
        near = deviation(tuple(t.cpu() for t in answer), right) <= _SUM_TOLERANCE
        return near, float(near)
    if op == "VectorQuantize":
        same = (answer.cpu() == right).all(-1).flatten()
        return bool(same.all()), same.double().mean().item()
    if op in _RANDOM:
        if _equal(answer, right.reshape(-1)):
            return True, 1.0
        return False, float(_uniform(_RANDOM[op](torch.as_tensor(answer)), right.numel()))
    if op in _CLOUDS:
        if _equal(answer, right):
            return True, 1.0
        return False, _CLOUDS[op](answer, right, *args)
    if isinstance(right, Tensor) and right.is_floating_point():
        share = _share_within(op, answer.cpu(), right, *args)
        return share == 1, share
    if op in _FOUND:
        if _equal(answer, right):
            return True, 1.0
        theirs, ours = _FOUND[op](answer), _FOUND[op](right)
        same = sum(
            key in theirs and math.isclose(theirs[key], score, rel_tol=_SCORE_TOLERANCE)
            for key, score in ours.items()
        )
        return False, same / max(1, len(theirs.keys() | ours.keys()))
    indices = torch.as_tensor(answer).cpu().reshape(-1)
    if len(indices) != len(right):
        return False, 0.0
    share = (indices == right).double().mean().item()
    if (kwargs or {}).get("precision") == "fast":
        return _near_best(indices, right, *args), share
    return torch.equal(indices, right), share


# Of random numbers, what is uniform between 0 and 1.
_RANDOM: dict[str, Callable[[Tensor], Tensor]] = {
    "counter_bits": lambda words: words.double() / 2**32,
    "counter_normal": lambda normals: torch.special.ndtr(normals.double()),
}


def _uniform(values: Tensor, count: int) -> bool:
    """By Kolmogorov and Smirnov's test, which a right generator fails once in 10^8 times."""
    if values.numel() != count:
        return False
    ordered = values.cpu().flatten().sort().values
    ranks = torch.arange(count, dtype=torch.float64)
    off = torch.maximum(ordered - ranks / count, (ranks + 1) / count - ordered).max()
    return bool(off * count**0.5 < 3.1)


def _near_best(indices: Tensor, right: Tensor, x: Tensor, codebook: Tensor) -> bool:
    """Whether each code is as near to the best as a fast lookup promises, by squared distances."""
    rows, codes = x.cpu().double(), codebook.cpu().double()
    worse = (rows - codes[indices]).square().sum(1) - (rows - codes[right]).square().sum(1)
    centre = codes.mean(0)
    size = (rows - centre).norm(dim=1) + (codes - centre).norm(dim=1).max()
    return bool((worse <= (2**-7 + codes.shape[1] * 2**-20) * size.square()).all())


def _equal(answer: Any, right: Any) -> bool:
    if isinstance(right, Tensor):
        return torch.equal(torch.as_tensor(answer).cpu().reshape(-1).to(right.dtype), right)
    return isinstance(answer, tuple) and all(
        torch.equal(a.cpu(), r) for a, r in zip(answer, right, strict=True)
    )


def _share_within(op: str, answer: Tensor, right: Tensor, boxes1: Tensor, boxes2: Tensor) -> float:
    """A rows' share at a time, as its tolerance takes many times the memory of the answer."""
    if answer.shape != right.shape:
        return 0.0
    tolerance = SPECS[op].tolerance
    assert tolerance is not None
    within = 0
    parts = (t.split(_ROWS // 8) for t in (boxes1.cpu(), answer, right))
    for boxes, a, r in zip(*parts, strict=True):
        allowed = tolerance(boxes, boxes2.cpu())
        within += int(((a.double() - r).abs() <= allowed).sum())
    return within / max(1, right.numel())


def _squared(idx: Tensor, p1: Tensor, p2: Tensor) -> Tensor:
    """Of each neighbour ``[B, N, K]``, in float64."""
    return (p1.double()[:, :, None] - rows_at(p2.double(), idx)).square().sum(-1)


def _as_near(answer: Any, right: Any, p1: Tensor, p2: Tensor, *_: Any) -> float:
    """The share of neighbours that are as near as the right ones, of equally near ones any."""
    idx = _indices(answer)
    if idx.shape != right[1].shape or not _distinct(idx).all():
        return 0.0
    near = torch.isclose(_squared(idx, p1.cpu(), p2.cpu()), right[0].double(), rtol=1e-6)
    return near.double().mean().item()


def _inside(answer: Any, right: Any, p1: Tensor, p2: Tensor, *options: Any) -> float:
    """The share of queries that have as many neighbours as they should, all inside the ball."""
    idx = _indices(answer)
    if idx.shape != right[1].shape:
        return 0.0
    limit = options[3] ** 2 * (1 + 1e-6)
    inside = (idx < 0) | (_squared(idx, p1.cpu(), p2.cpu()) < limit)
    as_many = (idx >= 0).sum(-1) == (right[1] >= 0).sum(-1)
    return float((inside.all(-1) & as_many & _distinct(idx)).double().mean())


def _distinct(idx: Tensor) -> Tensor:
    """Whether no neighbour of a query comes twice."""
    ascending = idx.sort(-1).values
    return ((ascending.diff() > 0) | (ascending[..., 1:] < 0)).all(-1)


def _same_points(answer: Any, right: Any, *_: Any) -> float:
    idx = _indices(answer)
    if idx.shape != right[1].shape:
        return 0.0
    return float((idx == right[1]).double().mean())


def _same_cells(answer: Any, right: Any, *_: Any) -> float:
    """The share of points in the right voxel, numbered again as voxels first appear."""
    other = torch.unique(answer.cpu(), return_inverse=True)[1]
    if other.shape != right.shape:
        return 0.0
    first = torch.full((int(other.max()) + 1,), len(other))
    first.scatter_reduce_(0, other, torch.arange(len(other)), "amin")
    return float((first.argsort().argsort()[other] == right).double().mean())


def _indices(answer: Any) -> Tensor:
    """Of distances and indices, or of indices alone."""
    found: Tensor = answer[1] if isinstance(answer, tuple) else answer
    return found.cpu()


_CLOUDS: dict[str, Callable[..., float]] = {
    "knn_points": _as_near,
    "ball_query": _inside,
    "sample_farthest_points": _same_points,
    "voxel_grid": _same_cells,
}


def _kept(answer: Any) -> dict[Any, float]:
    return dict.fromkeys(torch.as_tensor(answer).reshape(-1).tolist(), 0.0)


def _scored(answer: Any) -> dict[Any, float]:
    keep, scores = answer
    return dict(zip(keep.reshape(-1).tolist(), scores.reshape(-1).tolist(), strict=True))


def _detections(answer: Any) -> dict[Any, float]:
    """By image, class and location; padded tensors, or a list of the images' detections."""
    if not isinstance(answer, list):
        num, *padded = answer
        answer = [[t[image, :n] for t in padded] for image, n in enumerate(num.tolist())]
    return {
        (image, label, place): score
        for image, (_, scores, labels, places) in enumerate(answer)
        for score, label, place in zip(
            scores.tolist(), labels.tolist(), places.tolist(), strict=True
        )
    }


def _peaks(answer: Any) -> dict[Any, float]:
    scores, labels, ys, xs = (t.tolist() for t in answer)
    return {
        (image, *cell): score
        for image, peaks in enumerate(zip(scores, labels, ys, xs, strict=True))
        for score, *cell in zip(*peaks, strict=True)
        if cell[0] >= 0
    }


_FOUND: dict[str, Callable[[Any], dict[Any, float]]] = {
    "nms": _kept,
    "batched_nms": _kept,
    "nms_rotated": _kept,
    "soft_nms": _scored,
    "matrix_nms": _scored,
    "multiclass_nms": _detections,
    "peak_nms": _peaks,
}
