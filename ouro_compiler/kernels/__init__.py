"""Generated Triton kernels: spec -> source -> private cache -> launch (docs/kernels.md).

The only package that touches Triton, and only inside functions.
"""
