"""OuroMamba-Gen: calibration images made from the model itself (METHODS 5, docs/synthesis.md)."""
