"""`python -m bench.checks`: see bench/checks/command.py."""

from twotower_kernels.bench.checks.command import main

if __name__ == "__main__":
    raise SystemExit(main())
