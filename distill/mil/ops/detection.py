"""Operators of object detection."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.mil.ops.registry import op
from distill.mil.values import check_size


@op("non_maximum_suppression", exact=True, fresh=True)
def non_maximum_suppression(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_boxes: int,
    score_threshold: float | None = None,
    per_class_suppression: bool = False,
) -> tuple[Tensor, ...]:
    """The best boxes (centre x, centre y, width, height) that do not overlap a better one.

    iOS15: boxes (n, B, 4), scores (n, B, K); gives boxes, scores, indices and counts (n). iOS17, known by having no
    score_threshold: boxes (n, 4, B), scores (n, K, B); gives no counts. Unused rows are 0, with index -1.
    """
    boxes_last = score_threshold is None
    if boxes_last:
        boxes, scores = boxes.transpose(-1, -2), scores.transpose(-1, -2)
    if boxes.dim() != 3 or scores.dim() != 3 or boxes.shape != (*scores.shape[:2], 4) or 0 in scores.shape[1:]:
        raise ValueError(f"boxes {list(boxes.shape)} and scores {list(scores.shape)} do not agree")
    count, _, classes = scores.shape
    check_size([count, max_boxes, classes + 4])
    kept_boxes, kept_scores = boxes.new_zeros(count, max_boxes, 4), scores.new_zeros(count, max_boxes, classes)
    indices = torch.full((count, max_boxes), -1, dtype=torch.int32)
    found = torch.zeros(count, dtype=torch.int32)
    for n in range(count):
        chosen = select(boxes[n], scores[n], iou_threshold, score_threshold, max_boxes, per_class_suppression)
        size = found[n] = len(chosen)
        kept_boxes[n, :size], kept_scores[n, :size], indices[n, :size] = boxes[n, chosen], scores[n, chosen], chosen
    if boxes_last:
        return kept_boxes.transpose(1, 2), kept_scores.transpose(1, 2), indices
    return kept_boxes, kept_scores, indices, found


def select(
    boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float | None, limit: int, per_class: bool
) -> Tensor:
    """Numbers of the boxes kept of (B, 4) with scores (B, K), best first. A box counts by its best class."""
    best, label = scores.max(-1)
    order = torch.sort(best, descending=True, stable=True).indices
    waiting = order if score_threshold is None else order[best[order] >= score_threshold]
    if not len(waiting):
        return order[: min(1, limit)]  # Core ML returns the best box even where none reaches the threshold
    chosen: list[Tensor] = []
    while len(waiting) and len(chosen) < limit:
        first, waiting = waiting[0], waiting[1:]
        chosen.append(first)
        overlap = overlaps(boxes[first], boxes[waiting]) > iou_threshold
        if per_class:
            overlap &= label[waiting] == label[first]
        waiting = waiting[~overlap]
    return torch.stack(chosen) if chosen else order[:0]


def overlaps(box: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of a box (4) with others (N, 4); NaN where both are empty."""
    half, halves = box[2:].abs() / 2, others[:, 2:].abs() / 2
    low = torch.maximum(box[:2] - half, others[:, :2] - halves)
    high = torch.minimum(box[:2] + half, others[:, :2] + halves)
    common = (high - low).clamp(min=0).prod(-1)
    return common / (4 * half.prod(-1) + 4 * halves.prod(-1) - common)
