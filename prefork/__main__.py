"""`python -m prefork`, the same as the script `prefork`."""

from __future__ import annotations

from prefork.control.cli import main

if __name__ == "__main__":
    main()
