#include <cstring>

#include "kernels.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

#if defined(__x86_64__)
bool has_avxvnni() {  // older compilers have no name for it
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

}  // namespace

const openelm::Kernels* openelm::find_kernels(const char* name) {
    const auto wanted = [&](const char* kind) { return !*name || !std::strcmp(name, kind); };
#if defined(__x86_64__)
    __builtin_cpu_init();  // what follows asks the system too, whether it keeps such registers
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
    if (avx512 && wanted("avx512") && avx512_kernels()) return avx512_kernels();
    if (avx2 && has_avxvnni() && wanted("avxvnni") && avxvnni_kernels()) return avxvnni_kernels();
    if (avx2 && wanted("avx2") && avx2_kernels()) return avx2_kernels();
#endif
    return wanted("portable") ? portable_kernels() : nullptr;
}
