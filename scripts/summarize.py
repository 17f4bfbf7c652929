#!/usr/bin/env python3
"""Summarize whole documents in one context: `scripts/summarize.py FILE...`, the same as `ds-offload summarize`."""

import sys
from pathlib import Path

# After the installed packages: an uninstalled checkout works, an installed ds_offload comes first.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from ds_offload.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["summarize", *sys.argv[1:]]))
