"""The commands of `python -m perf`, a room each for those that share their words.

Thin: arguments, progress, exit codes. The work is done elsewhere, by modules that are imported when used, so
that `compare` and `report` never wait for torch.
"""
