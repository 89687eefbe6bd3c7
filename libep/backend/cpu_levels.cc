#include "backend/cpu_levels.h"

namespace ep {

Kernels cpu_kernels_base();
#if defined(EP_CPU_LEVELS_X86)
Kernels cpu_kernels_avx2();
Kernels cpu_kernels_avx512();
#endif

std::vector<CpuLevel> cpu_levels() {
    std::vector<CpuLevel> levels{{"base", true, cpu_kernels_base()}};
#if defined(EP_CPU_LEVELS_X86)
    const bool avx2 = __builtin_cpu_supports("avx2");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    levels.push_back({"avx2", avx2, cpu_kernels_avx2()});
    levels.push_back({"avx512", avx2 && avx512, cpu_kernels_avx512()});
#endif
    return levels;
}

}  // namespace ep
