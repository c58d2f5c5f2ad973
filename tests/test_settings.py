"""QuantConfig.with_setting: text to typed fields, by what they are declared as."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import pytest

import ouro_compiler as ouro
from ouro_compiler.config import QuantConfig, _with
from ouro_compiler.errors import UsageError


def _value(config: object, path: str) -> object:
    for name in path.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("activations.trigger=always", "always"),
        ("activations.threshold=dynamic_full", "dynamic_full"),
        ("activations.refresh_period=7", 7),
        ("activations.kappa=2.5", 2.5),
        ("activations.kappa=3", 3.0),
        ("weights.bits=6", 6),
        ("ptq4vm.asymmetric=false", False),
        ("ptq4vm.asymmetric=True", True),
        ("quamba.percentile=0.99", 0.99),
        ("recipe=ptq4vm", "ptq4vm"),
        ("ssm=none", "none"),
        ("exclude=layers.0*,head", ("layers.0*", "head")),
        ("exclude=", ()),
        (" seed = 4 ", 4),
    ],
)
def test_settings_that_fit(setting: str, value: object) -> None:
    before = ouro.W4A4.to_dict()
    found = ouro.W4A4.with_setting(setting)
    got = _value(found, setting.partition("=")[0].strip())
    assert got == value
    assert type(got) is type(value)
    assert ouro.W4A4.to_dict() == before
    assert QuantConfig.from_dict(found.to_dict()) == found


def test_only_the_setting_changes() -> None:
    found = ouro.W8A8.with_setting("activations.refresh_period=3")
    expected = dataclasses.replace(ouro.W8A8.activations, refresh_period=3)
    assert found == dataclasses.replace(ouro.W8A8, activations=expected)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("trigger", "a setting is written name=value, got 'trigger'"),
        ("", "a setting is written name=value, got ''"),
        ("trigger=always", "there is no setting trigger: QuantConfig has weights, activations"),
        ("activations.x=1", "there is no setting activations.x: DynamicOutlierSpec has inlier_b"),
        ("activations=4", "activations has parts of its own: set activations.NAME, one of inlier"),
        ("seed.more=4", "there is no setting seed.more: seed is a single value"),
        ("activations.trigger=", "trigger must be one of gated, always, global_any, got ''"),
        ("activations.threshold=mean", "threshold must be one of static_t, scalar, dynamic_full"),
        ("activations.refresh_period=2.5", "refresh_period must be of type int, got '2.5'"),
        ("activations.refresh_period=0", "refresh_period must be at least 1, got 0"),
        ("activations.kappa=nan", "kappa and kappa_delta must be numbers of at least 0"),
        ("activations.kappa_delta=-1", "kappa and kappa_delta must be numbers of at least 0"),
        ("ptq4vm.asymmetric=1", "ptq4vm.asymmetric must be true or false, got '1'"),
        ("ptq4vm.alpha=nan", r"alpha of ptq4vm must be in 0 .. 1, got nan"),
        ("weights.bits=5", r"weight bits must be one of \(4, 6, 8\), got 5"),
        ("quamba.percentile=0.2", r"percentile of quamba must be in 0.5 .. 1, got 0.2"),
        ("ksq.clusters=0", "ksq takes clusters >= 1"),
        ("ssm=all", "ssm must be one of none, params"),
        ("=3", "there is no setting : QuantConfig has"),
    ],
)
def test_settings_that_do_not_fit(setting: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        ouro.W4A4.with_setting(setting)


@dataclass(frozen=True, kw_only=True)
class _Inner:
    rounds: int = 3


@dataclass(frozen=True, kw_only=True)
class _Outer:
    """Fields whose present value tells nothing about their type."""

    count: int | None = None
    inner: _Inner | None = None
    sizes: tuple[int, ...] = ()
    given: _Inner = field(default_factory=_Inner)


def test_fields_that_may_be_none_are_parsed_by_their_declaration() -> None:
    outer = _Outer()
    assert _with(outer, ["count"], "5", "count").count == 5
    assert _with(_Outer(count=5), ["count"], "none", "count").count is None
    assert _with(outer, ["inner", "rounds"], "4", "inner.rounds").inner == _Inner(rounds=4)
    assert _with(_Outer(inner=_Inner()), ["inner"], "none", "inner").inner is None
    assert _with(outer, ["sizes"], "1,2", "sizes").sizes == (1, 2)
    with pytest.raises(UsageError, match="count must be of type int, got 'many'"):
        _with(outer, ["count"], "many", "count")
    with pytest.raises(
        UsageError, match=r"inner has parts of its own: set inner\.NAME, one of rou"
    ):
        _with(outer, ["inner"], "3", "inner")
    with pytest.raises(UsageError, match="given has parts of its own"):
        _with(outer, ["given"], "none", "given")
    with pytest.raises(UsageError, match="sizes must be of type int, got 'x'"):
        _with(outer, ["sizes"], "1,x", "sizes")
