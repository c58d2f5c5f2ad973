"""`ouro-compile` and `ouro`: options in app.py, a file a command, output in console.py."""

from ouro_compiler.cli.app import compile_main, main

__all__ = ["compile_main", "main"]
