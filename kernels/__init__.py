"""Triton kernels and their launchers, one module a family.

Importing this package imports neither triton nor a driver; importing a family's module imports
triton. A launcher runs on CPU tensors where TRITON_INTERPRET=1 was set before triton's import.
"""
