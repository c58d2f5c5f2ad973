"""Running, saving and loading compiled models. Needs neither passes nor calibration."""
