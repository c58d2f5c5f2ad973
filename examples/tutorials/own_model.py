"""A module that the project does not know: any nn.Module on image tensors can be compiled."""

import torch
from torch import Tensor, nn

import ouro_compiler as ouro


class PatchMixer(nn.Module):
    """Patches of an image as tokens, two layers that mix channels, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 32, 7, stride=7)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 96), nn.GELU(), nn.Linear(96, 32))
            for _ in range(2)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(1))


torch.manual_seed(0)
model = PatchMixer().eval()
images = torch.randn(16, 1, 28, 28)
compiled = ouro.compile(model, images[:1], ouro.W8A8, calibration=images)
print(compiled.report.table("layers"))
print(f"SNR of the logits: {compiled.report['logits_snr_db']:.1f} dB")
# The command does the same: ouro-compile my_package.my_module:PatchMixer --input-shape 1x28x28
