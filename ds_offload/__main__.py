"""`python -m ds_offload` is the command line."""

import sys

from ds_offload.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
