"""Attention over pages: of rows of one token, of chunks, on a device; and as Transformers calls it."""
