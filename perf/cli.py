"""`python -m perf COMMAND`: all commands, and how the program ends.

Exit codes are those of perf/errors.py, 130 on Ctrl-C, and 70 where this program itself is at fault, for 1
means a regression.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from engine import InputError
from perf import config, console
from perf.commands import importing, machine, revisions, saved, serving, storing, sweeping
from perf.errors import Exit, GateError
from perf.gate import tolerances

BROKEN = 70  # this program itself is at fault
NEEDED = ("scipy", "jinja2", "pytest", "pytest_benchmark")  # the extra `perf`
CODES = "Exit codes: 0 pass, 1 regression, 2 usage, 3 not comparable, 4 inconclusive."
HELP = f"The performance gate. {CODES}"
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=HELP)
for room in (saved, importing, storing, revisions, sweeping, machine, serving):
    app.add_typer(room.app)


def defaults() -> dict[str, dict[str, Any]]:
    """Return the defaults that the settings of the project give, by command and parameter, as click takes
    them.

    Raises:
        SettingsError: for settings that cannot be used.
    """
    settings = config.load(Path.cwd())
    tolerances.check_settings(settings)
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    return _defaults(group, settings)


def _defaults(group: TyperGroup, settings: config.Settings) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, command in group.commands.items():
        values = {one.name: settings.default(one.name) for one in command.params if one.name}
        found[name] = {parameter: value for parameter, value in values.items() if value is not None}
        if isinstance(command, TyperGroup):
            found[name] |= _defaults(command, settings)
    return found


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; what the user can mend ends in one message on standard error."""
    try:
        app(args, default_map=defaults())
    except GateError as error:
        console.fail(error, error.code)
    except (InputError, OSError, config.SettingsError) as error:
        console.fail(error, Exit.USAGE)
    except Exception as error:
        missing = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if missing in NEEDED:
            console.fail(InputError(f"perf needs {missing}: pip install 'dynamic-batch[perf]'"), Exit.USAGE)
        traceback.print_exc()
        sys.exit(BROKEN)
