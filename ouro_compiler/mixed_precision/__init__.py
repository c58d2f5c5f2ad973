"""Bits for every layer: what each one costs, and the choice that meets a size or a quality."""
