"""Measured runs of the engine, kept with the command that made them; imports nothing but the engine's public API."""
