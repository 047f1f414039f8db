"""The command ``python -m benchmarks.report``; see ``reporting.page``."""

import sys

from benchmarks.reporting.page import main

if __name__ == "__main__":
    sys.exit(main())
