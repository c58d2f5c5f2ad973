"""`python -m ouro_compiler`: the same as `ouro`."""

from ouro_compiler.cli import main

main()
