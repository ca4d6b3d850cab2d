"""`python -m server` is `atlas-jax`."""

import sys

from server.cli import main

if __name__ == "__main__":
    sys.exit(main())
