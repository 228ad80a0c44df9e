// AVX2 and FMA. Compiled for them, so nothing but the one function below may be called before the CPU is known.
#include "kernels.inl"

const openelm::Kernels* openelm::avx2_kernels() {
#if defined(__AVX2__)
    static const Kernels kernels = table("avx2");
    return &kernels;
#else
    return nullptr;
#endif
}
