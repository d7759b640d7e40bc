"""The tests; a package, so that `python -m tests.replay_policies` runs from the repository's root."""
