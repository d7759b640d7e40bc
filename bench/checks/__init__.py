"""What a machine must show before its figures count: `python -m bench.checks`, installed `twotower check`."""
