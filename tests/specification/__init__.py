"""The specification, reference/, against definitions, other programs and itself."""
