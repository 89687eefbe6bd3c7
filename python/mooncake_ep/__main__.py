"""Run the command line: python -m mooncake_ep is the same as mooncake-ep."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
