"""What a VLA is taught: targets and loss terms, each a mean over what is known.

Letters of shapes: B images, Q questions about each, D action dimensions, N patches, K of them kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def contents(images: Tensor, grid: int) -> Tensor:
    """How much there is in each patch of images (B, S, S, 3): (B, N), positive. The spread of its green, half of it."""
    side = images.shape[1] // grid
    green = images[..., 1].view(-1, grid, side, grid, side)[:, :, ::2, :, ::2]  # (B, row, y, column, x)
    return green.transpose(2, 3).flatten(3).float().std(3).flatten(1) + 4


def draw(weights: Tensor, fraction: float) -> Tensor:
    """A fraction of the N places, ascending, (B, K), without replacement (Gumbel's trick), likelier by weight (B, N)."""
    chance = weights.log() - torch.empty_like(weights).exponential_().log()
    return chance.topk(max(1, round(fraction * weights.shape[1])), dim=1).indices.sort(1).values


def action_loss(
    scores: Tensor,
    actions: Tensor,
    first_bin: int,
    vocab: int,
    continuous: Tensor,
    weights: Tensor,
    smoothing: float,
    mean_weight: float,
) -> Tensor:
    """Scores of tokens (R, D, V) and action tokens (R, D) -> scalar: cross-entropy with the target spread over near bins.

    Added to it is the distance of the distribution's mean: to cross-entropy bins are just names, neighbours or not.

    Args:
        scores, actions: R answers.
        first_bin, vocab: token ids from ``first_bin`` to ``vocab`` - 1 stand for one bin each.
        continuous, weights: by dimension, (D,): whether bins are neighbours there, and its weight.
        smoothing: standard deviation, in bins, of a continuous dimension's target.
        mean_weight: weight of the distance of the mean, in units of the full range.
    """
    ids = torch.arange(first_bin, vocab, device=scores.device)
    distance = (ids - actions[..., None]).float()  # (R, D, bins)
    spread = torch.where(continuous[:, None], smoothing, 1e-3)
    target = (-0.5 * (distance / spread) ** 2).softmax(-1)
    log_p = scores.float().log_softmax(-1)[..., first_bin:vocab]
    mean = (log_p.exp() * (ids - first_bin)).sum(-1) / (vocab - first_bin)  # (R, D), 0 to 1
    wanted = (actions - first_bin) / (vocab - first_bin)
    off = F.smooth_l1_loss(mean, wanted, beta=0.02, reduction="none") * continuous
    per_dim = (mean_weight * off - (target * log_p).sum(-1)).mean(0)  # (D,)
    return (per_dim * weights).sum() / weights.sum()


def heat_loss(heat: Tensor, pointer: Tensor, names: Tensor, target: Tensor, seen: Tensor, keep: Tensor) -> Tensor:
    """Logits of hand and place (B, 2, N), of the asked objects (B, Q, K) over the kept places ``keep`` (B, K) and (B, Q, N)
    over all, their targets (B, 2 + Q, N), and which are seen (B, 2 + Q) -> scalar: cross-entropy over the patches."""
    places = -(target[:, :2] * heat.float().log_softmax(-1)).sum(-1)  # (B, 2)
    # Where the patches around a point were dropped there is less to point at.
    left = target[:, 2:].gather(2, keep[:, None].expand(-1, pointer.shape[1], -1))  # (B, Q, K)
    pointed = -(left * pointer.float().log_softmax(-1)).sum(-1)  # (B, Q)
    named = -(target[:, 2:] * names.float().log_softmax(-1)).sum(-1)  # (B, Q)
    return 2 * mean_where(places, seen[:, :2]) + mean_where(pointed + named, seen[:, 2:])


def reach_loss(reach: Tensor, positions: Tensor) -> Tensor:
    """Ways (B, Q, 2, 3), decimetres, positions of hand, place and objects (B, 2 + Q, 3), metres -> scalar: how far off."""
    hand, place, items = positions[:, :1], positions[:, 1:2], positions[:, 2:]
    vectors = torch.stack([items - hand, (place - hand).expand_as(items)], 2)  # (B, Q, 2, 3)
    off = F.smooth_l1_loss(reach.float(), 10 * vectors.nan_to_num(), beta=0.1, reduction="none").mean(-1)  # (B, Q, 2)
    return mean_where(off, vectors.isfinite().all(-1))


def soft_targets(points: Tensor, grid: int, patch: float) -> tuple[Tensor, Tensor]:
    """Points (B, P, 2), pixels, as weights over the four nearest patches: (B, P, N), and whether known and seen (B, P)."""
    at = (points + 0.5) / patch - 0.5  # (B, P, 2) column and row, patch centres at integers
    seen = ((at > -0.5) & (at < grid - 0.5)).all(-1)
    at = torch.where(seen[..., None], at, torch.zeros_like(at)).clamp(0, grid - 1)
    lines = torch.arange(grid, device=points.device)
    weights = (1 - (at[..., None] - lines).abs()).clamp(min=0)  # (B, P, 2, grid)
    return (weights[:, :, 1, :, None] * weights[:, :, 0, None, :]).flatten(2), seen


def expected_points(heat: Tensor, grid: int, patch: float) -> Tensor:
    """Where heat maps (B, P, N), logits, are on average: pixels (B, P, 2)."""
    p = heat.softmax(-1)
    centres = (torch.arange(grid, device=heat.device) + 0.5) * patch - 0.5
    rows, columns = centres.repeat_interleave(grid), centres.repeat(grid)
    return torch.stack([p @ columns, p @ rows], -1)


def mean_where(values: Tensor, where: Tensor) -> Tensor:
    """The mean of values where ``where``, of the same shape -> scalar; 0 where nowhere."""
    return (values * where).sum() / where.sum().clamp(min=1)
