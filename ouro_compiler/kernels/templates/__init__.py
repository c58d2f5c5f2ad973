"""Triton kernels as text: `codegen` turns one of these files and a KernelSpec into a source file.

Never imported by the package. Constexpr parameters come last; codegen gives each its value. The
imports from `common` and `quantizer` are replaced by what they name.
"""
