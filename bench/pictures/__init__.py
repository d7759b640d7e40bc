"""Pictures, drawn from saved runs alone: `python -m bench.pictures`."""
