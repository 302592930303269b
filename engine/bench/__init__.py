"""The main job: one workload through every policy at every batch size, measured alike, in one table.

`options` says what is asked and `workload`, with the modules named after it, which requests there are: no
torch may enter those. `compare` runs them, `report` shows the runs, `command` is all of it for `python -m
engine bench`.
"""
