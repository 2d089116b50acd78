"""`python -m vlbeit` and `torchrun -m vlbeit`: the same as the `vlbeit` command."""

import sys

from vlbeit.cli import main

if __name__ == "__main__":
    sys.exit(main())
