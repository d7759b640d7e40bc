"""What is printed and saved of a run."""
