"""Load tests: each module is a program, `python -m loadtest.NAME`. See README.md."""
