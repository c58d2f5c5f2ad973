"""Numbers that papers print, for comparison: published, not reproduced here.

ImageNet top-1 in %, from OuroMamba (arXiv 2503.10959, its tables and supplement), which also ran
PTQ4VM and QMamba. None: not printed there.
"""

from __future__ import annotations

Cells = dict[str, float | None]

# (model, floating point, method, calibration images, accuracy by preset)
IMAGENET: list[tuple[str, float, str, str, Cells]] = [
    ("Vim-T", 76.10, "PTQ4VM", "256 real", {"w4a8": 74.15, "w6a6": 73.94, "w4a4": 56.29}),
    ("Vim-T", 76.10, "QMamba", "1024 real", {"w4a8": 70.13, "w6a6": 57.95, "w4a4": 53.41}),
    ("Vim-T", 76.10, "OuroMamba", "128 synthetic", {"w4a8": 74.98, "w6a6": 74.84, "w4a4": 63.49}),
    ("Vim-S", 81.60, "PTQ4VM", "256 real", {"w8a8": 81.23, "w4a8": 74.37, "w4a4": 69.60}),
    ("Vim-S", 81.60, "QMamba", "1024 real", {"w4a8": 74.12, "w4a4": 33.64}),
    ("Vim-S", 81.60, "OuroMamba", "128 synthetic", {"w8a8": 81.42, "w4a8": 79.81, "w4a4": 75.93}),
    ("VMamba-T", 82.60, "PTQ4VM", "256 real", {"w4a8": 77.02, "w6a6": 75.67, "w4a4": 72.67}),
    ("VMamba-T", 82.60, "QMamba", "1024 real", {"w4a8": 76.51, "w6a6": 80.49, "w4a4": 51.48}),
    ("VMamba-T", 82.60, "OuroMamba", "128 synthetic",
     {"w4a8": 81.73, "w6a6": 80.15, "w4a4": 77.56}),
    ("MambaVision-T", 82.30, "PTQ4VM", "256 real", {"w4a8": 72.13, "w6a6": 69.39, "w4a4": 67.67}),
    ("MambaVision-T", 82.30, "QMamba", "1024 real", {"w4a8": 71.93, "w6a6": 68.17, "w4a4": 65.33}),
    ("MambaVision-T", 82.30, "OuroMamba", "128 synthetic",
     {"w4a8": 80.57, "w6a6": 79.05, "w4a4": 74.92}),
]  # fmt: skip

# Vim-B: outlier detection by preset; the static list is of 64 channels.
ABLATION: dict[str, Cells] = {
    "w4a8": {"none": 74.28, "static": 76.87, "dynamic": 80.17},
    "w4a4": {"none": 0.10, "static": 56.73, "dynamic": 77.34},
}
