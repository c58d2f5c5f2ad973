"""Stand-ins for what public Vision Mamba code needs and a machine may lack (docs/standins.md)."""

from ouro_compiler.frontend.standins.functions import replaced_functions
from ouro_compiler.frontend.standins.modules import install_standins

__all__ = ["install_standins", "replaced_functions"]
