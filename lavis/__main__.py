"""`python -m lavis` is the command `lavis`."""

import sys

from lavis.cli import main

if __name__ == "__main__":
    sys.exit(main())
