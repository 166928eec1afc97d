"""`python -m fxprune` is the command `fxprune`."""

from __future__ import annotations

from fxprune.cli import main

if __name__ == "__main__":
    main()
