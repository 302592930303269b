"""`python -m perf`."""

import sys

from perf.shadow import USAGE, explain

if __name__ == "__main__":
    try:
        from perf.cli import main
    except (Exception, SystemExit) as error:  # not code 1 of an uncaught one, which means a regression
        print(f"error: {explain(error, 'run it from elsewhere, or python -P -m perf')}", file=sys.stderr)
        sys.exit(USAGE)
    main()
