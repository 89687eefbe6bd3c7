// Marks functions that kernels may call too. On the host they are always inlined: the CPU's kernels
// are compiled for several levels of the instruction set, and the linker keeps one copy of a
// function.
#pragma once

#if defined(__CUDACC__) || defined(__MACACC__)
#define EP_HOST_DEVICE __host__ __device__
#else
#define EP_HOST_DEVICE __attribute__((always_inline))
#endif
