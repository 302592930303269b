"""Servers that are measured: how they are named, when they are ready, how one is started and stopped; and
those that others wrote, each in an environment of its own.

It imports neither torch nor a server, nor an HTTP client but that of the standard library.
"""
