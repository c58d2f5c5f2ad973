"""A normalised graph run with its quantizers, without editing it: what the QUANTIZE passes insert.

Which layers are quantized can be chosen, scales can be replaced, and a part of the graph can be run
on the values before it: for learning scales block by block and for measuring layers one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ouro_compiler.calibration.quantizers import (
    ScanConstants,
    SiteQuantizer,
    WeightQuantizer,
    scan_constants,
)
from ouro_compiler.config import QuantConfig
from ouro_compiler.errors import UsageError
from ouro_compiler.graph import (
    OUTPUT,
    Calibration,
    QParams,
    Site,
    StepParams,
    all_arguments,
    aten,
    get_constant,
    is_op,
)

Values = dict[fx.Node, Any]
_SCAN = torch.ops.ouro.selective_scan.default


class Simulation(fx.Interpreter):
    """Runs nodes of a graph on values of those before them, quantizing at its sites.

    quantizers: by the site's name; weights and scans: by layer. Constants are in `constants`, once.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        sites: Sequence[Site],
        calibration: Calibration,
        config: QuantConfig,
        *,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(gm)
        self.gm = gm
        self.device = device or torch.device("cpu")
        self.constants: Values = {}
        for node in gm.graph.nodes:
            if (constant := get_constant(gm, node)) is not None:
                self.constants[node] = constant.detach()
        self.quantizers: dict[str, SiteQuantizer] = {}
        self.weights: dict[str, WeightQuantizer] = {}
        self._at: dict[fx.Node, list[Site]] = {}
        self.scans: dict[str, ScanConstants] = {}
        for site in sites:
            self._at.setdefault(site.node, []).append(site)
            params = calibration.sites[site.name]
            if isinstance(params, StepParams):
                raise UsageError(
                    "scales inside a scan's recurrence cannot be learned, nor bits chosen: use "
                    "--ssm none, or params with a recipe that quantizes around scans"
                )
            if site.name not in self.quantizers:
                self.quantizers[site.name] = SiteQuantizer(
                    site, params, config.activations, self.device
                )
            bits = config.for_layer(site.layer).weights.bits
            if is_op(site.node, aten.linear.default) and site.layer not in self.weights:
                self.weights[site.layer] = WeightQuantizer(
                    self._constant(site.node.args[1]),
                    calibration.weights.get(site.layer),
                    bits,
                    self.quantizers[site.name],
                )
            elif is_op(site.node, _SCAN) and site.index == 1 and isinstance(params, QParams):
                arguments = all_arguments(site.node)
                D = None if arguments[5] is None else self._constant(arguments[5])
                self.scans[site.layer] = scan_constants(self._constant(arguments[2]), D, bits)
        self._layers: Collection[str] | None = None
        self._quantized: dict[str, Tensor] = {}

    def round_constants(self) -> None:
        """Let parameters that are not quantized have the fp16 values that an artefact stores."""
        for node, value in self.constants.items():
            half = value.half()
            if value.dtype == torch.float32 and bool(torch.isfinite(half).all()):
                self.constants[node] = half.float()

    def _constant(self, node: Any) -> Tensor:
        found: Tensor = self.constants[node]
        return found

    def values_of(self, batch: Tensor) -> Values:
        """What a run starts from: the constants and a batch of images."""
        (placeholder,) = (node for node in self.gm.graph.nodes if node.op == "placeholder")
        return {**self.constants, placeholder: batch}

    def run_nodes(
        self,
        nodes: Iterable[fx.Node],
        values: Values,
        *,
        layers: Collection[str] | None = None,
    ) -> Values:
        """Values after these calls, in order, less those that nothing after them reads.

        values: of everything before; it is not changed. layers: those quantized, None for all.
        """
        self.env = dict(values)
        self._layers, self._quantized = layers, {}
        for node in nodes:
            self.env[node] = self.run_node(node)
            for dead in self.user_to_last_uses.get(node, ()):
                self.env.pop(dead, None)
        found, self.env = self.env, {}
        return found

    def outputs(self, values: Values) -> Tensor:
        """The graph's first output, from the values after its last call."""
        output = next(node for node in self.gm.graph.nodes if node.op == "output")
        result = fx.node.map_arg(output.args[0], lambda node: values[node])
        return result if isinstance(result, Tensor) else result[0]

    def run_node(self, n: fx.Node) -> Any:
        sites = [site for site in self._at.get(n, ()) if self._is_quantized(site.layer)]
        scan = self.scans.get(sites[0].layer) if sites else None
        given: Any = (list(n.args), n.kwargs) if scan is None else (all_arguments(n), {})
        args, kwargs = fx.node.map_arg(given, lambda node: self.env[node])
        args = list(args)
        for site in sites:
            if site.index != OUTPUT:
                args[site.index] = self._round_trip(site, args[site.index])
        if scan is not None:
            args[2], args[5] = scan.A, scan.D
        if sites and sites[0].layer in self.weights:
            args[1] = self.weights[sites[0].layer]()
        value = getattr(self, n.op)(n.target, tuple(args), kwargs)
        for site in sites:
            if site.index == OUTPUT:
                value = self._round_trip(site, value)
        return value

    def _is_quantized(self, layer: str) -> bool:
        return self._layers is None or layer in self._layers

    def _round_trip(self, site: Site, x: Tensor) -> Tensor:
        if site.name not in self._quantized:
            quantizer = self.quantizers[site.name]
            shape = x.shape
            tokens = x.flatten(1, -2).transpose(1, 2) if site.transpose else x
            made = quantizer(tokens)
            if site.transpose:
                made = made.transpose(1, 2)
                made = made.unflatten(1, shape[1:-1]) if len(shape) == 4 else made
            self._quantized[site.name] = made
        return self._quantized[site.name]


def simulated(
    simulation: Simulation, layers: Collection[str] | None = None
) -> Callable[[Tensor], Tensor]:
    """The whole graph as a function of images, with these layers quantized (None: all)."""
    calls = [node for node in simulation.gm.graph.nodes if node.op == "call_function"]

    def run(batch: Tensor) -> Tensor:
        batch = batch.to(simulation.device)
        return simulation.outputs(
            simulation.run_nodes(calls, simulation.values_of(batch), layers=layers)
        )

    return run
