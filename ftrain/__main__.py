"""`python -m ftrain`: the command line, as `ftrain` is; for launchers that start modules."""

import sys

from ftrain.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
