"""The options of `ouro-compile`: type, flags and help of each."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Ssm(str, Enum):
    """--ssm"""

    none = "none"
    params = "params"
    full = "full"


class Outliers(str, Enum):
    """--outliers"""

    none = "none"
    static = "static"
    dynamic = "dynamic"


class InlierScale(str, Enum):
    """--inlier-scale"""

    per_time_step = "per-time-step"
    per_tensor = "per-tensor"


class Features(str, Enum):
    """--features"""

    yp = "yp"
    alpha = "alpha"


class OutputLoss(str, Enum):
    """--output-loss"""

    ce = "ce"
    mae = "mae"
    none = "none"


class TargetName(str, Enum):
    """--target"""

    cpu = "cpu"
    cuda = "cuda"


class ScanForm(str, Enum):
    """--scan"""

    scan = "scan"
    contrib = "contrib"


class Format(str, Enum):
    """--format"""

    text = "text"
    json = "json"
    dot = "dot"
    graphml = "graphml"
    model_explorer = "model-explorer"


Html = Annotated[
    Path | None, typer.Option(help="one page: graph, every pass, layers, outliers, sizes")
]
Trace = Annotated[
    Path | None, typer.Option(help="run an artefact under torch.profiler, for Perfetto or Chrome")
]
PageImages = Annotated[
    int | None, typer.Option(min=1, help="of --html and --trace: images at most (8; 1)")
]
PagePreset = Annotated[
    str | None, typer.Option(help="of a model: w4a4 (the default), w4a8, w6a6 or w8a8")
]
PageTime = Annotated[
    bool, typer.Option("--time", help="of --html: measure every node (bytes then differ)")
]
ModelArgument = Annotated[
    str,
    typer.Argument(
        help="state_dict (.pth, .pt, .safetensors), torch.export .pt2, or package.module:function"
    ),
]
ModelArg = Annotated[
    list[str] | None, typer.Option(help="of a function: name=value, as often as needed")
]
Checkpoint = Annotated[Path | None, typer.Option(help="of a function: weights to load")]
InputShape = Annotated[str | None, typer.Option(help="of a function: CxHxW, such as 1x28x28")]
W4a4 = Annotated[bool, typer.Option("--w4a4", help="4-bit weights and activations")]
W4a8 = Annotated[bool, typer.Option("--w4a8", help="4-bit weights, 8-bit activations")]
W6a6 = Annotated[bool, typer.Option("--w6a6", help="6-bit weights and activations")]
W8a8 = Annotated[bool, typer.Option("--w8a8", help="8-bit weights and activations")]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", help="artefact to write (MODEL.PRESET.pt2)")
]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="folder of images, .npz or .safetensors of arrays, 'noise', or 'synthetic' (made from "
        "the model, the default)"
    ),
]
Images = Annotated[int, typer.Option(min=1, help="calibration images at most")]
Iterations = Annotated[
    int | None,
    typer.Option(min=1, help="of synthetic images: steps (1000 on a GPU, 50 or 100 on a CPU)"),
]
NoCache = Annotated[
    bool, typer.Option("--no-cache", help="make synthetic images anew, and keep none")
]
FeaturesOption = Annotated[
    Features, typer.Option(help="patches are compared by outputs, or by implicit attention")
]
OutputLossOption = Annotated[
    OutputLoss, typer.Option(help="what random labels are wanted by: cross-entropy, MAE, nothing")
]
SynthesisBatch = Annotated[
    int | None, typer.Option(min=1, help="images at a time (as memory allows, at most 32)")
]
SsmOption = Annotated[
    Ssm, typer.Option(help="operands of the scans to quantize; full: inside the recurrence too")
]
RecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe", help="method: ouromamba, rtn, ptq4vm, qmamba, ksq or quamba (docs/recipes.md)"
    ),
]
InspectedRecipe = Annotated[
    str | None, typer.Option("--recipe", help="of a model: method (ouromamba; docs/recipes.md)")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="any setting of the configuration, as activations.trigger=always; repeatable"
    ),
]
OutliersOption = Annotated[Outliers, typer.Option(help="how outliers are found")]
InlierScaleOption = Annotated[
    InlierScale, typer.Option(help="static scales: one a time step, or one for all of them")
]
TargetOption = Annotated[TargetName, typer.Option(help="device it will run on")]
Precompile = Annotated[
    str | None, typer.Option(help="compile its kernels now, for sm_80,sm_90 ... (--target cuda)")
]
Arch = Annotated[str | None, typer.Option(help="architecture, where the weights cannot tell")]
Ema = Annotated[
    bool, typer.Option("--ema", help="of a training checkpoint: the average of its weights")
]
Include = Annotated[list[str] | None, typer.Option(help="layers to quantize, as patterns (all)")]
Exclude = Annotated[list[str] | None, typer.Option(help="layers to leave alone, as patterns")]
Verify = Annotated[str | None, typer.Option(help="labelled images to measure accuracy on")]
MaxDrop = Annotated[
    float | None, typer.Option(min=0.0, help="accuracy points that may be lost (exit 5)")
]
Refine = Annotated[
    bool, typer.Option("--refine", help="learn the scales, block by block (docs/refine.md)")
]
Mixed = Annotated[
    bool,
    typer.Option("--mixed", help="choose bits for every layer, to meet --max-drop or the next two"),
]
BudgetMb = Annotated[
    float | None, typer.Option(help="MB that parameters and scales may take (implies --mixed)")
]
MinSnr = Annotated[
    float | None, typer.Option(help="dB that the logits' SNR must reach (implies --mixed; exit 5)")
]
Replay = Annotated[
    Path | None, typer.Option(help="take the configuration, bits of layers too, from a --report")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="say what would be quantized, write nothing")
]
Strict = Annotated[
    bool, typer.Option("--strict", help="fail if a selected layer is refused (exit 4)")
]
Report = Annotated[Path | None, typer.Option(help="write the report as JSON")]
BatchSize = Annotated[int, typer.Option(min=1, help="images at a time")]
Seed = Annotated[int, typer.Option(help="of noise, of choosing and of synthesising images")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="unpickle MODEL: it can run any code")
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="print errors only")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="log every pass")]
