"""Saved runs on a branch of the repository: their history as plain files, which a clone has and CI can reach.

`layout` says where a file lies, `branch` is the git of it, `transfer` moves runs between a storage and the
branch. It touches no working tree, no index, no HEAD and no branch but its own, and imports no torch.
"""

from perf.store.branch import BRANCH, Branch, open_branch
from perf.store.transfer import Moved, Stored, pull, push, stored

__all__ = ["BRANCH", "Branch", "Moved", "Stored", "open_branch", "pull", "push", "stored"]
