"""`python -m bench`: see bench/command.py."""

from twotower_kernels.bench.command import main

if __name__ == "__main__":
    raise SystemExit(main())
