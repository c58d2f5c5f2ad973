"""compile(): what the whole pipeline promises (METHODS T30-T33), the report, strictness."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx, nn

import ouro_compiler as ouro
from ouro_compiler.config import QuantConfig
from ouro_compiler.errors import ModelError, RefusedLayerError, UsageError, VerificationError
from ouro_compiler.evaluation import snr_db
from ouro_compiler.frontend.capture import capture
from ouro_compiler.graph import argument, get_constant, is_op
from ouro_compiler.ops import QUANTIZERS
from ouro_compiler.passes import NORMALIZE, QUANTIZE
from ouro_compiler.passes.base import PassContext, run_passes
from ouro_compiler.recipes import ouromamba
from tests.models import compiled_vim, images, small_vim


def changed(config: QuantConfig, **activations: object) -> QuantConfig:
    spec = dataclasses.replace(config.activations, **activations)  # type: ignore[arg-type]
    return dataclasses.replace(config, activations=spec)


def test_nothing_selected_is_the_model_bit_for_bit() -> None:
    """T30"""
    config = dataclasses.replace(ouro.W4A4, exclude=("*",))
    gm = capture(small_vim(2), images(2))
    run_passes(gm, NORMALIZE, PassContext(config=config))
    plan = ouromamba.plan(gm, config)
    assert plan.sites == []
    assert run_passes(gm, QUANTIZE, PassContext(config=config, sites=plan.sites)) == []
    # The same batch: ATen's own kernels differ between batch sizes in the last bits.
    assert torch.equal(gm(images()), small_vim(2)(images()))


def test_wide_bits_come_close() -> None:
    """T31: 8 bits with outliers kept in floating point."""
    model = ouro.compile(
        small_vim(),
        images(2),
        dataclasses.replace(ouro.W8A8, ssm="none"),
        calibration=images(),
    )
    expected = small_vim()(images(8, seed=1))
    assert (model(images(8, seed=1)) - expected).abs().max() < 2e-2 * expected.abs().max()
    assert snr_db(expected, model(images(8, seed=1))) > 36


@pytest.mark.parametrize("preset", ["w4a4", "w6a6", "w8a8"])
def test_codes_stay_in_range(preset: str) -> None:
    """T32"""
    model = compiled_vim(ouro.PRESETS[preset])
    seen: list[tuple[int, bool, Tensor]] = []

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if is_op(n, *QUANTIZERS):
                plain = is_op(n, torch.ops.ouro.quantize_dynamic_outlier.default)
                asymmetric = plain and argument(n, "zero_point") is not None
                bits = argument(n, "inlier_bits"), argument(n, "outlier_bits")
                start = value[2]
                unlisted = (start == torch.iinfo(start.dtype).max).all(1)  # never in any window
                codes = value[0].transpose(1, 2)[unlisted]
                seen.append((bits[0], asymmetric, codes))
            return value

    Watch(model.graph_module).run(images(8, seed=1))
    assert len(seen) == 12
    for bits, asymmetric, codes in seen:
        limit = 2 ** (bits - 1) - 1
        low = -limit - 1 if asymmetric else -limit
        assert codes.numel() == 0 or (codes.min() >= low and codes.max() <= limit)
    for node in model.graph_module.graph.nodes:
        if is_op(node, torch.ops.ouro.linear_dynamic_outlier.default):
            qweight = get_constant(model.graph_module, argument(node, "qweight"))
            assert qweight is not None
            packed = preset == "w4a4"
            assert qweight.dtype == (torch.uint8 if packed else torch.int8)


def test_batch_invariance() -> None:
    """T33: a sample's logits do not depend on the batch it is in."""
    model = compiled_vim(depth=2)
    batch = images(8, seed=2)
    loud = torch.cat([batch, 20 * images(8, seed=3)])
    whole = model(loud)[:8]
    scale = whole.abs().max()
    for index in range(8):
        alone = model(batch[index : index + 1])
        assert (alone - whole[index]).abs().max() <= 1e-3 * scale
    permuted = model(batch.flip(0)).flip(0)
    assert (permuted - model(batch)).abs().max() <= 1e-3 * scale


def test_report_counts_every_layer() -> None:
    report = compiled_vim().report
    layers = report["layers"]
    assert layers["total"] == 1 + 6 + 2 + 2 + 1  # patch embedding, linears, convs, scans, head
    assert layers["quantized"] == 6 + 2
    assert layers["simulated"] == 2
    skipped = {row["name"]: row for row in layers["skipped"]}
    assert set(skipped) == {
        "patch_embed.proj",
        "layers.0.mixer.conv1d",
        "layers.0.mixer.conv1d_b",
        "head",
    }
    assert all(row["reason"] and not row["selected"] for row in skipped.values())
    assert 0 < report["outlier_share"] < 0.2
    assert len(report["sites"]) == 12
    assert report["accuracy"] == {"before": None, "after": None}


def test_bytes_are_those_of_the_constants() -> None:
    model = compiled_vim()
    size = model.report["bytes"]
    held = model.program.state_dict
    assert size["stored"] == sum(t.numel() * t.element_size() for t in held.values())
    assert size["stored"] == sum(part["stored"] for part in size["by_part"].values())
    assert size["fp16"] == 2 * sum(p.numel() for p in small_vim().parameters())
    linears = size["by_part"]["linear weights"]
    weights = [m.weight for m in small_vim().layers.modules() if isinstance(m, nn.Linear)]
    assert linears["fp16"] == 2 * sum(w.numel() for w in weights)
    assert linears["stored"] == sum(len(w) * ((w.shape[1] + 1) // 2) for w in weights)
    assert not any(tensor.dtype == torch.float32 for tensor in held.values())


def test_ssm_none_leaves_scans_alone_and_says_so() -> None:
    config = dataclasses.replace(ouro.W4A4, ssm="none")
    report = compiled_vim(config).report
    rows = {row["name"]: row for row in report["layers"]["rows"]}
    scan = rows["layers.0.mixer.selective_scan"]
    assert scan["status"] == "skipped"
    assert "ssm = none" in scan["reason"]
    assert len(report["sites"]) == 6


def test_layer_norm_mean_pool_and_head_token_models_compile() -> None:
    from ouro_compiler.models.vim import vim_micro

    for options in (
        {"norm": "layer", "cls_position": "none"},
        {"cls_position": "head", "if_divide_out": False},
        {"stride": 8, "d_state": 8},
    ):
        torch.manual_seed(0)
        model = vim_micro(depth=1, **options).eval()
        compiled = ouro.compile(model, images(1), ouro.W8A8, calibration=images())
        expected = model(images(4, seed=1)).detach()
        assert snr_db(expected, compiled(images(4, seed=1))) > 20


class RunTimeWeight(nn.Module):
    """A linear whose weight is no constant, beside one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.maker = nn.Linear(4, 4)
        self.fixed = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        return self.fixed(torch.nn.functional.linear(tokens, self.maker(tokens)[0]))


def test_a_refused_layer_is_a_row_and_an_error_under_strict() -> None:
    x = torch.randn(4, 4, 2, 2)
    model = ouro.compile(RunTimeWeight(), x, calibration=x)
    refused = [row for row in model.report["layers"]["skipped"] if row["selected"]]
    assert len(refused) == 1
    assert refused[0]["reason"] == "its weight is computed at run time"
    with pytest.raises(RefusedLayerError, match="computed at run time"):
        ouro.compile(RunTimeWeight(), x, calibration=x, strict=True)


class NoGraph(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def test_bad_input_is_one_sentence() -> None:
    with pytest.raises(ModelError, match="cannot trace NoGraph"):
        ouro.compile(NoGraph(), images(2), calibration=images())
    with pytest.raises(UsageError, match="not finite"):
        ouro.compile(small_vim(), images(2), calibration=torch.full((2, 1, 28, 28), torch.nan))
    half = copy.deepcopy(small_vim()).bfloat16()
    with pytest.raises(UsageError, match=r"input is torch.bfloat16: call model.float\(\)"):
        ouro.compile(half, images(2).bfloat16(), calibration=images())
    with pytest.raises(UsageError, match=r"compiled for images"):
        compiled_vim()(torch.zeros(1, 1, 32, 32))


def test_capture_leaves_the_model_as_it_was() -> None:
    model = small_vim().train()
    capture(model, images(1))
    assert all(module.training for module in model.modules())
    model.eval()


class Explodes(nn.Module):
    """Finite on the calibration images, infinite on louder ones."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(28, 28)

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(self.linear(x.flatten(1, 2)) * 30).sum(1)


class Loud:
    description, labels = "loud images", None

    def __len__(self) -> int:
        return 2

    def batches(self, size: int) -> Iterator[Tensor]:
        del size
        yield 100 * images(2)


def test_an_output_that_is_not_finite_fails_verification() -> None:
    with pytest.raises(VerificationError, match="not all finite"):
        ouro.compile(Explodes(), images(2), calibration=images(), verify=Loud())


def test_config_round_trip_and_strictness() -> None:
    for config in (ouro.W4A4, changed(ouro.W8A8, outliers="static", refresh_period=5)):
        assert QuantConfig.from_dict(config.to_dict()) == config
    with pytest.raises(UsageError, match="no field colour"):
        QuantConfig.from_dict({"colour": 1})
    with pytest.raises(UsageError, match="no field bit"):
        QuantConfig.from_dict({"weights": {"bit": 4}})
    for wrong in ({"inlier_bits": 5}, {"outliers": "some"}, {"refresh_period": 0}):
        with pytest.raises(UsageError):
            changed(ouro.W4A4, **wrong)
