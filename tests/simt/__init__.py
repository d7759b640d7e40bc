"""CUDA C++ kernels run on a host, so that they are tested without a GPU."""
