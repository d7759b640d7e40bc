"""The kernels in other libraries' models; each is imported by its user alone, and only where it is installed."""
