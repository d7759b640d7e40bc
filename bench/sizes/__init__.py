"""The sizes of the models that are measured and reckoned with."""
