// The thread pool that the kernels share with PyTorch. It is looked up by name at run time (csrc/threads.cpp), so
// nothing is linked against an OpenMP library; in a process without one, work is serial.
#pragma once

namespace tt {

int max_threads();                                                  // 1 inside a parallel region or without a pool
void run_on_threads(void (*work)(void*), void* data, int threads);  // calls work(data) once on each of them

}  // namespace tt
