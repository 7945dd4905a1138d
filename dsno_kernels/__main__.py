"""`python -m dsno_kernels COMMAND`."""

import sys

from dsno_kernels.commands import main

if __name__ == "__main__":
    sys.exit(main())
