"""Servers that are measured: how they are named, when they are ready, and how one is started and stopped.

Standard library alone: the gate starts servers without torch, and without an HTTP client of its own.
"""
