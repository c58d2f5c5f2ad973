"""Where tokens lie in the image, for every family (METHODS 5.3, T26, T28)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from ouro_compiler.calibration.synthesis.features import FeatureLayer, find_layers
from ouro_compiler.compiler import prepare
from ouro_compiler.config import W4A4
from ouro_compiler.frontend.capture import capture
from ouro_compiler.models.mambavision import ARCHITECTURES as MAMBAVISION
from ouro_compiler.models.vim import vim_micro
from ouro_compiler.models.vit import ARCHITECTURES as VIT
from ouro_compiler.models.vmamba import vmamba_tiny


def layers_of(model: nn.Module, *shape: int) -> list[FeatureLayer]:
    """The feature layers of a model's normalised graph."""
    gm = normalised(model, *shape)
    return find_layers(gm)[0]


def normalised(model: nn.Module, *shape: int) -> fx.GraphModule:
    """The graph that synthesis reads."""
    gm = capture(model.eval(), torch.randn(2, *shape))
    prepare(gm, W4A4)
    return gm


@pytest.mark.parametrize("place", ["middle", "head", "none"])
def test_vim_leaves_out_its_class_token_in_both_directions(place: str) -> None:
    pool = "mean" if place == "none" else "cls"
    layers = layers_of(vim_micro(depth=2, cls_position=place, final_pool=pool), 1, 28, 28)
    token = {"middle": 24, "head": 0, "none": 99}[place]
    expected = [step + (step >= token) for step in range(49)]
    assert [layer.name for layer in layers] == ["layers.0.mixer", "layers.1.mixer"]
    for layer in layers:
        assert len(layer.operators) == 2
        for _, grid in layer.operators:
            assert (grid.height, grid.width) == (7, 7)
            assert grid.steps.tolist() == [expected]


def test_vmamba_maps_four_orders_to_the_raster() -> None:
    layers = layers_of(vmamba_tiny(depths=(1, 1, 1, 1), embed_dim=16), 3, 64, 96)
    assert [(o[0][1].height, o[0][1].width) for o in (x.operators for x in layers)] == [
        (16, 24),
        (8, 12),
        (4, 6),
    ]  # the last stage has 2 x 3 patches: too few
    for layer in layers:
        assert len(layer.operators) == 4
        height, width = layer.operators[0][1].height, layer.operators[0][1].width
        rows = torch.arange(height * width)
        columns = rows.view(width, height).t().flatten()
        found = sorted(grid.steps[0].tolist() for _, grid in layer.operators)
        assert found == sorted([rows.tolist(), columns.tolist()] * 2)
        reversed_ = [node.args[9] for node, _ in layer.operators]
        assert sorted(reversed_) == [False, False, True, True]


def test_public_spellings_of_the_cross_scan_keep_their_places() -> None:
    class Public(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, 8, 4, stride=4)
            self.A = nn.Parameter(-torch.rand(32, 2) - 0.1)
            self.B = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patch(x)
            sequences = torch.ops.ouro.cross_scan(x)
            B = self.B(sequences.transpose(2, 3)).mean(1).transpose(1, 2)
            u = sequences.flatten(1, 2)
            y = torch.ops.ouro.selective_scan(u, u.sigmoid(), self.A, B, B)
            merged = torch.ops.ouro.cross_merge(y.unflatten(1, (4, 8)), *x.shape[2:])
            u = torch.cat((merged, merged.flip(2)), 1).repeat(1, 2, 1)
            y = torch.ops.ouro.selective_scan(merged, merged.sigmoid(), self.A[:8], B, B)
            return y.mean(2)

    (layer,) = layers_of(Public(), 3, 16, 24)[-1:]
    assert layer.operators[-1][1].steps.tolist() == [list(range(24))]


def test_mambavision_has_windows_and_attention() -> None:
    small = replace(MAMBAVISION["mambavision_tiny"], depths=(1, 1, 2, 2), embed_dim=16)
    layers = layers_of(small.build(), 3, 224, 288)
    sizes = [(x.operators[0][1].windows, x.operators[0][1].is_full) for x in layers]
    # 14 x 18 patches in windows of 14: the second is 4 wide. Then 7 x 9, windows of 7.
    assert sizes == [(2, False)] * 4
    first = layers[0].operators[0][1]
    assert int((first.steps[0] >= 0).sum()) == 14 * 14
    assert int((first.steps[1] >= 0).sum()) == 14 * 4
    names = {str(node.target) for x in layers for node, _ in x.operators}
    assert names == {"ouro.selective_scan.default", "aten.scaled_dot_product_attention.default"}


def test_vit_compares_attention_without_its_class_token() -> None:
    layers = layers_of(replace(VIT["deit_tiny"], depth=2).build(), 3, 224, 224)
    assert len(layers) == 2
    assert layers[0].operators[0][1].steps.tolist() == [list(range(1, 197))]


def test_what_has_no_map_is_a_note() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.A = nn.Parameter(-torch.rand(8, 2))
            self.embed = nn.Linear(28 * 28, 8 * 6)
            self.B = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            u = self.embed(x.flatten(1)).view(-1, 8, 6)
            B = self.B(u.transpose(1, 2)).transpose(1, 2)
            return torch.ops.ouro.selective_scan(u, u.sigmoid(), self.A, B, B).mean(2)

    layers, notes = find_layers(normalised(Pooled(), 1, 28, 28))
    assert layers == []
    assert notes == ["synthesis: 1 scans or attentions have no map of patches"]
