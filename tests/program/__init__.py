"""The command `twotower`."""
