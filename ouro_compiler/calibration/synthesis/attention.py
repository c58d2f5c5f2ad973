"""Features of patches from inside a scan or an attention: what L^C compares (METHODS 5.2).

Sequences are in the order of their operator; results are in raster order, a row a patch:
(B * windows, P, F). A scan's hidden states are first averaged over the p x p patches around each
patch, weighted by Delta (`h_p`), then seen through its C: as implicit attention `alpha_p` (how much
each token weighs for the patch) or as output `y_p`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ouro_compiler.calibration.synthesis.positions import Grid
from ouro_compiler.config import HiddenWeights
from ouro_compiler.ops.activations import softplus

_ELEMENTS = 1 << 25  # of one chunk of channels, at most: 128 MiB in fp32


@dataclass(frozen=True, kw_only=True)
class ScanOperands:
    """What one scan reads: u, step (B, E, L), A (E, N), B and C (B, N, L) or (B, G, N, L).

    step: Delta, after its bias and softplus.
    """

    u: Tensor
    step: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    reverse: bool

    @staticmethod
    def of(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        reverse: bool = False,
    ) -> ScanOperands:
        """From the arguments of `ouro::selective_scan`; D and z say nothing of the states."""
        del D, z
        step = delta.float()
        if delta_bias is not None:
            step = step + delta_bias.float()[:, None]
        if delta_softplus:
            step = softplus(step)
        B, C = (matrix[:, None] if matrix.dim() == 3 else matrix for matrix in (B, C))
        return ScanOperands(
            u=u.float(), step=step, A=A.float(), B=B.float(), C=C.float(), reverse=reverse
        )

    def channels(self, chosen: Tensor) -> ScanOperands:
        """The scan of some channels (int64, in rising order), each with a B and C of its own."""
        if len(chosen) == self.u.shape[1]:
            return self
        width = self.u.shape[1] // self.B.shape[1]
        groups = chosen // width
        shared = self.B.shape[1] == 1
        return ScanOperands(
            u=self.u[:, chosen],
            step=self.step[:, chosen],
            A=self.A[chosen],
            B=self.B if shared else self.B[:, groups],
            C=self.C if shared else self.C[:, groups],
            reverse=self.reverse,
        )


def hidden_states(scan: ScanOperands) -> Tensor:
    """h (B, L, N, E) of a scan, through the scan itself: each state is a channel of its own.

    The operator computes states of all channels anyway; with N = 1 and C = 1 its output is they.
    """
    batch, channels, length = scan.u.shape
    groups, states = scan.B.shape[1:3]

    def repeated(x: Tensor) -> Tensor:
        token_major = x.transpose(1, 2)[:, :, None].expand(batch, length, states, channels)
        return token_major.flatten(2).transpose(1, 2)

    b = scan.B.transpose(1, 2).reshape(batch, states * groups, 1, length)
    h = torch.ops.ouro.selective_scan(
        repeated(scan.u),
        repeated(scan.step),
        scan.A.t().reshape(-1, 1),
        b,
        torch.ones_like(b),
        reverse=scan.reverse,
    )
    return h.transpose(1, 2).unflatten(2, (states, channels))


def patch_weights(step: Tensor, kind: HiddenWeights) -> Tensor:
    """w (B, L): the mean of Delta over the channels of each token, or 1."""
    return torch.ones_like(step[:, 0]) if kind == "uniform" else step.mean(1)


def box_sum(x: Tensor, grid: Grid, patch: int) -> Tensor:
    """(B, P, F) in raster order -> sums over the patch x patch cells around each, clipped."""
    maps = x.transpose(1, 2).unflatten(2, (grid.height, grid.width))
    maps = maps.contiguous(memory_format=torch.channels_last)
    summed = F.avg_pool2d(maps, patch, stride=1, padding=patch // 2, divisor_override=1)
    return summed.flatten(2).transpose(1, 2)


def weights_of_neighbours(
    w: Tensor, grid: Grid, patch: int, kind: HiddenWeights
) -> tuple[Tensor, Tensor]:
    """(w (B, P), 1 / its sum over each neighbourhood): what the average h_p is weighted with.

    w: (B, L) in the order of the scan. For kind `raw` the second is 1.
    """
    found = grid.gather(w) * grid.present(w.shape[0] // grid.windows).to(w.device)
    if kind == "raw":
        return found, torch.ones_like(found)
    total = box_sum(found[..., None], grid, patch)[..., 0]
    return found, 1 / total.clamp(min=1e-20)


def patched_outputs(scan: ScanOperands, grid: Grid, patch: int, kind: HiddenWeights) -> Tensor:
    """y_p(tau) = C_tau . h_p(tau): (B * windows, P, E)."""
    w, scale = weights_of_neighbours(patch_weights(scan.step, kind), grid, patch, kind)
    parts = []
    per_channel = w.numel() * scan.A.shape[1]
    for chosen in _chunks(scan.u.shape[1], per_channel):
        part = scan.channels(chosen.to(w.device))
        h = grid.gather(hidden_states(part))  # (B, P, N, e)
        states, channels = h.shape[2:]
        h = box_sum((h * w[..., None, None]).flatten(2), grid, patch)
        h = h.unflatten(2, (states, channels)) * scale[..., None, None]
        parts.append(_read(h, grid.gather(part.C.permute(0, 3, 1, 2))))
    return torch.cat(parts, -1)


def _read(h: Tensor, C: Tensor) -> Tensor:
    """h (B, P, N, E) through C (B, P, G, N): (B, P, E)."""
    groups = C.shape[2]
    grouped = h.unflatten(3, (groups, -1))
    return torch.einsum("bpnge,bpgn->bpge", grouped, C).flatten(2)


def implicit_attention(scan: ScanOperands) -> Tensor:
    """alpha (B, E, L, L): alpha[t, j] is how much u_j weighs in y_t, D and z left out.

    Closed form: the product of the decays between j and t is exp(A (S_t - S_j)), S being the
    running sum of Delta. For small L: memory is B * E * N * L * L.
    """
    response = _responses(scan)  # (B, e, N, k, j)
    C = _per_channel(scan.C, scan.u.shape[1])
    return torch.einsum("benkj,benk->bekj", response, C)


def _responses(scan: ScanOperands) -> Tensor:
    """(B, E, N, L, L): the states at k that an impulse u_j = 1 leaves."""
    step = scan.step.flip(2) if scan.reverse else scan.step
    total = step.cumsum(2)
    total = total.flip(2) if scan.reverse else total
    exponent = (total[..., :, None] - total[..., None, :])[:, :, None] * scan.A[..., None, None]
    later = torch.ones_like(exponent[0, 0, 0], dtype=torch.bool)
    later = later.triu() if scan.reverse else later.tril()
    decay = exponent.masked_fill(~later, float("-inf")).exp()
    entering = scan.step[:, :, None] * _per_channel(scan.B, scan.u.shape[1])
    return decay * entering[..., None, :]


def _per_channel(matrix: Tensor, channels: int) -> Tensor:
    """(B, G, N, L) -> (B, E, N, L)."""
    return matrix.repeat_interleave(channels // matrix.shape[1], dim=1)


def patched_attention(scan: ScanOperands, grid: Grid, patch: int, kind: HiddenWeights) -> Tensor:
    """alpha_p (B * windows, E, P, L): `implicit_attention` with h_p in the place of h."""
    w, scale = weights_of_neighbours(patch_weights(scan.step, kind), grid, patch, kind)
    response = _responses(scan)
    channels = scan.u.shape[1]
    placed = grid.gather(response.permute(0, 3, 1, 2, 4))  # (B, P, e, N, j)
    placed = placed * w[..., None, None, None]
    averaged = box_sum(placed.flatten(2), grid, patch).view(placed.shape)
    C = grid.gather(_per_channel(scan.C, channels).permute(0, 3, 1, 2))
    return torch.einsum("bpenj,bpen->bepj", averaged * scale[..., None, None, None], C)


def attention_rows(scan: ScanOperands, grid: Grid, patch: int, kind: HiddenWeights) -> Tensor:
    """a_tau = mean over channels of |alpha_p[tau, :]|, columns of patches only: (B, P, P)."""
    channels, length = scan.u.shape[1:]
    total: Tensor | None = None
    for chosen in _chunks(channels, scan.B[:, 0].numel() * length):
        part = patched_attention(scan.channels(chosen.to(scan.u.device)), grid, patch, kind)
        rows = part.abs().sum(1)
        total = rows if total is None else total + rows
    assert total is not None
    return grid.gather((total / channels).transpose(1, 2)).transpose(1, 2)


def explicit_attention_rows(
    query: Tensor, key: Tensor, scale: float, grid: Grid, patch: int
) -> Tensor:
    """The same of softmax attention: its probabilities, averaged over heads and neighbours.

    query, key: (B * windows, heads, L, d). Weights of neighbours are uniform: there is no Delta.
    """
    rows = (query.float() @ key.float().transpose(-2, -1) * scale).softmax(-1).mean(1)
    placed = grid.gather(grid.gather(rows).transpose(1, 2))  # (B, columns, rows)
    ones = torch.ones_like(rows[:, :, 0])
    w, divisor = weights_of_neighbours(ones, grid, patch, "uniform")
    placed = placed.transpose(1, 2)
    return box_sum(placed * w[..., None], grid, patch) * divisor[..., None]


def _chunks(channels: int, elements_per_channel: int) -> list[Tensor]:
    """Channel indices, in parts whose states fit into memory."""
    size = max(1, min(channels, _ELEMENTS // max(1, elements_per_channel)))
    return list(torch.arange(channels).split(size))
