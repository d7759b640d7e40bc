"""The program `twotower`: its commands, what they show, and their arguments."""
