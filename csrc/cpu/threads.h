// The thread pool that the kernels share with PyTorch. It is looked up by name at run time (csrc/threads.cpp), so
// nothing is linked against an OpenMP library; in a process without one, work is serial.
#pragma once

namespace tt {

int max_threads();  // 1 inside a parallel region or without a pool

// Calls work(data) once on each of them. Where one or more end in out_of_memory(), the others finish first, then this
// does too.
void run_on_threads(void (*work)(void*), void* data, int threads);

// Throws std::bad_alloc, of which Python makes a MemoryError. Here and not where memory is wanted: sources that are
// compiled per instruction set instantiate nothing of the standard library.
[[noreturn]] void out_of_memory();

}  // namespace tt
