"""Features of patches from inside a scan or an attention: what L^C compares (METHODS 5.2).

Sequences are in the order of their operator; results are in raster order, a row a patch:
(B * windows, P, F). A scan's hidden states are first averaged over the p x p patches around each
patch, weighted by Delta (`h_p`), then seen through its C: as implicit attention `alpha_p` (how much
each token weighs for the patch) or as output `y_p`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ouro_compiler.calibration.synthesis.positions import Grid
from ouro_compiler.config import HiddenWeights
from ouro_compiler.ops.activations import softplus
from ouro_compiler.ops.selective_scan import per_channel

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


def neighbour_weights(w: Tensor, around: Tensor, kind: HiddenWeights) -> Tensor:
    """Weights (B, P, K) of the tokens around each patch, from w (B, L) of each token.

    around: (windows, P, K), of `Grid.around`. They sum to 1, but for kind `raw`. No gradient flows
    through them.
    """
    around = around.repeat(w.shape[0] // len(around), 1, 1)
    rows = w.detach()[:, None].expand(-1, around.shape[1], -1)
    found = rows.gather(2, around.clamp(min=0)) * (around >= 0)
    return found if kind == "raw" else found / found.sum(2, keepdim=True).clamp(min=1e-20)


def patch_weights(step: Tensor, kind: HiddenWeights) -> Tensor:
    """w (B, L): the mean of Delta over the channels of each token, or 1."""
    return torch.ones_like(step[:, 0]) if kind == "uniform" else step.mean(1)


def averaging(w: Tensor, grid: Grid, patch: int, kind: HiddenWeights) -> Tensor:
    """`neighbour_weights` as a matrix (B, P, L): times a sequence, it averages neighbourhoods."""
    around = grid.around(patch).to(w.device)
    weights = neighbour_weights(w, around, kind)
    matrix = w.new_zeros(*weights.shape[:2], w.shape[1])
    tokens = around.clamp(min=0).repeat(len(weights) // len(around), 1, 1)
    return matrix.scatter_add(2, tokens, weights)


def patched_outputs(scan: ScanOperands, grid: Grid, patch: int, kind: HiddenWeights) -> Tensor:
    """y_p(tau) = C_tau . h_p(tau): (B * windows, P, E)."""
    around = grid.around(patch).to(scan.u.device)
    return torch.ops.ouro.patched_scan(
        scan.u,
        scan.step,
        scan.A,
        scan.B,
        scan.C,
        neighbour_weights(patch_weights(scan.step, kind), around, kind),
        grid.steps.to(scan.u.device),
        around,
        scan.reverse,
    )


def implicit_attention(scan: ScanOperands) -> Tensor:
    """alpha (B, E, L, L): alpha[t, j] is how much u_j weighs in y_t, D and z left out.

    Closed form: the product of the decays between j and t is exp(A (S_t - S_j)), S being the
    running sum of Delta. For small L: memory is B * E * N * L * L.
    """
    response = _responses(scan)  # (B, e, N, k, j)
    C = per_channel(scan.C, scan.u.shape[1])
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
    entering = scan.step[:, :, None] * per_channel(scan.B, scan.u.shape[1])
    return decay * entering[..., None, :]


def patched_attention(scan: ScanOperands, grid: Grid, patch: int, kind: HiddenWeights) -> Tensor:
    """alpha_p (B * windows, E, P, L): `implicit_attention` with h_p in the place of h."""
    channels = scan.u.shape[1]
    matrix = averaging(patch_weights(scan.step, kind), grid, patch, kind)
    averaged = torch.einsum("bpk,benkj->benpj", matrix, _responses(scan))
    C = grid.gather(per_channel(scan.C, channels).permute(0, 3, 1, 2))
    return torch.einsum("benpj,bpen->bepj", averaged, C)


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
    ones = torch.ones_like(rows[:, :, 0])
    columns = grid.gather(rows.transpose(1, 2)).transpose(1, 2)  # of patches only
    return averaging(ones, grid, patch, "uniform") @ columns


def _chunks(channels: int, elements_per_channel: int) -> list[Tensor]:
    """Channel indices, in parts whose states fit into memory."""
    size = max(1, min(channels, _ELEMENTS // max(1, elements_per_channel)))
    return list(torch.arange(channels).split(size))
