"""Scales, zero points and thresholds from data: `{site: QParams}`."""
