"""`python -m tools.kernel_report`: see `tools.kernel_report.report`."""

import sys

from tools.kernel_report.report import main

if __name__ == "__main__":
    sys.exit(main())
