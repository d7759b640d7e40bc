"""Kernels in CUDA C++: compiled and launched (`build`), and the launchers of each family of ops."""
