"""The CPU target: C++ generated from templates, compiled by the machine's compiler."""
