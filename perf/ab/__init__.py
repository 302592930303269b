"""Two revisions measured against each other: live processes that take turns, in working trees of their own.

`main` is the way in; `bisect` and `selftest` use it or its parts. From git to a verdict: `revisions` and
`worktrees` make the trees, `import_log` and `import_proof` prove what each process measured, `turns` and
`turn_agent` give the turn, `groups` are what comes of it, `in_turn` and `sequential` say how sure that is,
`experiment` decides how long to go on, and `blocks` is the way without turns. It imports neither torch nor
pytest but in `turn_agent`, which runs inside the processes.
"""
