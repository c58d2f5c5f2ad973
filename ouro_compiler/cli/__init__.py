"""`ouro-compile` and `ouro`: options in app.py, one file a command, what they print in console.py."""

from ouro_compiler.cli.app import compile_main, main

__all__ = ["compile_main", "main"]
