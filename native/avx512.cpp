// AVX-512 with VNNI; products of bf16 too where the CPU has them.
#include "kernels.inl"

const openelm::Kernels* openelm::avx512_kernels() {
#if defined(__AVX512VNNI__)
    static const Kernels kernels = [] {
        Kernels k = table("avx512");
        if (__builtin_cpu_supports("avx512bf16")) k.block_bf16 = 24, k.bf16 = bf16, k.pack_bf16 = pack_bf16;
        return k;
    }();
    return &kernels;
#else
    return nullptr;
#endif
}
