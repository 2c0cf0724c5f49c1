"""`python -m evaluation ...` is `longreach eval ...`."""

import sys

from longreach.cli.eval import main

if __name__ == "__main__":
    sys.exit(main())
