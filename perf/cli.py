"""`python -m perf COMMAND`: all commands, and how the program ends.

Exit codes are those of perf/errors.py, 130 on Ctrl-C, and 70 where this program itself is at fault, for 1
means a regression.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

import typer

from engine import InputError
from perf import console
from perf.commands import machine, revisions, saved
from perf.errors import Exit, GateError

BROKEN = 70  # this program itself is at fault
NEEDED = ("scipy", "jinja2", "pytest", "pytest_benchmark")  # the extra `perf`
CODES = "Exit codes: 0 pass, 1 regression, 2 usage, 3 not comparable, 4 inconclusive."
HELP = f"The performance gate. {CODES}"
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=HELP)
for room in (saved, revisions, machine):
    app.add_typer(room.app)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; what the user can mend ends in one message on standard error."""
    try:
        app(args)
    except GateError as error:
        console.fail(error, error.code)
    except (InputError, OSError) as error:
        console.fail(error, Exit.USAGE)
    except Exception as error:
        missing = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if missing in NEEDED:
            console.fail(InputError(f"perf needs {missing}: pip install 'dynamic-batch[perf]'"), Exit.USAGE)
        traceback.print_exc()
        sys.exit(BROKEN)
