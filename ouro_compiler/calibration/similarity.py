"""Steps of k-scaled quantizers by the similarity of a layer's output (METHODS 8.2, 8.3).

Channels (or tokens) are clustered by their mean magnitude; a cluster has one step. Codes are
[-2^(b-1), 2^(b-1) - 1]: an asymmetric quantizer whose zero point is 2^(b-1). A step is searched
among 100 multiples of the cluster's largest magnitude / (2^(b-1) - 0.5), one cluster at a time, for
the largest mean cosine between the quantized output and the floating-point one, along features.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ouro_compiler.calibration.clusters import group_peaks, kmeans
from ouro_compiler.calibration.search import round_to_half
from ouro_compiler.graph import QWeight
from ouro_compiler.ops.fake_quantize import fake_quantize_ref
from ouro_compiler.ops.quantize import MIN_SCALE

GAMMAS = tuple(0.01 + 1.19 * i / 99 for i in range(100))
_TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class Steps:
    """ids: the cluster of each channel or token, (K,) or (L,) int64; steps (k,): each one's."""

    ids: Tensor
    steps: Tensor
    tokens: bool = False  # ids are of tokens

    @property
    def scale(self) -> Tensor:
        """Against (..., L, K): (K,), or (L, 1) of tokens."""
        found = self.steps[self.ids]
        return found[:, None] if self.tokens else found


def zero_point(bits: int) -> Tensor:
    """(1,): what makes codes 0 .. 2^b - 1 those of the module docstring."""
    return torch.tensor([2.0 ** (bits - 1)])


def quantized(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """x rounded to steps that broadcast against it, in fp32."""
    return fake_quantize_ref(x.float(), scale, zero_point(bits), bits)


def largest_step(peak: Tensor, bits: int) -> Tensor:
    """Where a search starts: the step at which the largest magnitude has the last code."""
    return round_to_half((peak / (2 ** (bits - 1) - 0.5)).clamp(min=MIN_SCALE))


def clustered(mean: Tensor, peak: Tensor, count: int, bits: int, *, tokens: bool = False) -> Steps:
    """Clusters of mean magnitudes (n,), steps by the largest magnitude (n,) in each."""
    ids = kmeans(mean, count)
    return Steps(ids=ids, steps=largest_step(group_peaks(peak, ids), bits), tokens=tokens)


def to_powers_of_two(steps: Tensor) -> Tensor:
    """Every step as the first one times the nearest power of two."""
    return steps[0] * torch.exp2(torch.round(torch.log2(steps / steps[0])))


def cosine(made: Tensor, wanted: Tensor) -> Tensor:
    """Mean cosine along the last axis; rows without a direction count 0."""
    return F.cosine_similarity(made, wanted, dim=-1, eps=_TINY).mean()


def search_steps(
    x: Tensor, wanted: Tensor, start: Steps, bits: int, *, power_of_two: bool = False
) -> Steps:
    """Steps for x (B, L, K), or (M, K) of channels, from `start`, smallest cluster first."""
    search = _search_tokens if start.tokens else _search_channels
    steps = search(x.float(), wanted.float(), start, bits)
    return dataclasses.replace(start, steps=to_powers_of_two(steps) if power_of_two else steps)


def _search_channels(x: Tensor, wanted: Tensor, start: Steps, bits: int) -> Tensor:
    """Cosines of whole rows, of which only the searched cluster's sums are computed anew."""
    length = wanted.square().sum(-1)
    masks = [start.ids == cluster for cluster in range(len(start.steps))]
    sums = [
        _sums(x[..., mask], wanted[..., mask], step, bits)
        for mask, step in zip(masks, start.steps, strict=True)
    ]
    steps = start.steps.clone()
    for cluster, mask in enumerate(masks):
        part, part_wanted = x[..., mask], wanted[..., mask]
        dots = sum((one[0] for i, one in enumerate(sums) if i != cluster), torch.zeros(()))
        squares = sum((one[1] for i, one in enumerate(sums) if i != cluster), torch.zeros(()))
        best = -float("inf")
        for step in _candidates(start.steps[cluster]):
            dot, square = _sums(part, part_wanted, step, bits)
            norm = ((squares + square) * length).sqrt().clamp(min=_TINY)
            score = float(((dots + dot) / norm).mean())
            if score > best:
                best, steps[cluster], sums[cluster] = score, step, (dot, square)
    return steps


def _sums(x: Tensor, wanted: Tensor, step: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    made = quantized(x, step, bits)
    return (made * wanted).sum(-1), made.square().sum(-1)


def _search_tokens(x: Tensor, wanted: Tensor, start: Steps, bits: int) -> Tensor:
    steps = start.steps.clone()
    for cluster in range(len(steps)):
        mask = start.ids == cluster
        part, part_wanted = x[:, mask], wanted[:, mask]
        best = -float("inf")
        for step in _candidates(start.steps[cluster]):
            score = float(cosine(quantized(part, step, bits), part_wanted))
            if score > best:
                best, steps[cluster] = score, step
    return steps


def search_per_row(x: Tensor, peak: Tensor, bits: int) -> Tensor:
    """A step (L,) for each row of x (B, L, K) by the mean cosine over the batch; peak (L,)."""
    start = largest_step(peak, bits)
    best, steps = torch.full_like(start, -float("inf")), start.clone()
    for step in _candidates(start):
        made = quantized(x, step[:, None], bits)
        score = F.cosine_similarity(made, x, dim=-1, eps=_TINY).mean(0)
        better = score > best
        best, steps = torch.where(better, score, best), torch.where(better, step, steps)
    return steps


def _candidates(step: Tensor) -> list[Tensor]:
    return [round_to_half((step * gamma).clamp(min=MIN_SCALE)) for gamma in GAMMAS]


@dataclass(frozen=True, kw_only=True)
class SearchedLinear:
    """A linear's weight, with its corrected bias if it has one, and its output's quantizer."""

    weight: QWeight
    output: Steps


def search_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    start: Steps,
    *,
    bits: int,
    weight_bits: int,
    rounds: int,
    power_of_two: bool = False,
) -> SearchedLinear:
    """Weight and output in turns, each given the other (METHODS 8.3).

    x is (B, L, K) or (M, K). One step for the whole weight (O, K). A round that changes nothing is
    the last one. The bias is corrected by the mean shift of each output feature.
    """
    x, weight = x.float(), weight.float()
    wanted = F.linear(x, weight, bias)
    first = largest_step(weight.abs().max(), weight_bits)
    step, output = first, start

    def made(step: Tensor) -> Tensor:
        return F.linear(x, quantized(weight, step, weight_bits), bias)

    for _ in range(rounds):
        before = (float(step), output.steps.tolist())
        scale = output.scale
        best = -float("inf")
        for candidate in _candidates(first):
            score = float(cosine(quantized(made(candidate), scale, bits), wanted))
            if score > best:
                best, step = score, candidate
        output = search_steps(made(step), wanted, start, bits, power_of_two=power_of_two)
        if before == (float(step), output.steps.tolist()):
            break
    shift = (quantized(made(step), output.scale, bits) - wanted).flatten(0, -2).mean(0)
    found = per_tensor_weight(weight, step, weight_bits)
    if bias is not None:
        found = dataclasses.replace(found, bias=bias.float() - shift)
    return SearchedLinear(weight=found, output=output)


def per_tensor_weight(weight: Tensor, step: Tensor, bits: int) -> QWeight:
    """Codes (O, everything else) of a weight of any rank with one step."""
    rows = weight.float().flatten(1)
    half = 2 ** (bits - 1)
    codes = torch.round(rows / step).clamp(-half, half - 1).to(torch.int8)
    return QWeight(codes=codes, scale=step.expand(len(rows)).clone())
