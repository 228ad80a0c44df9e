// AVX2 with VNNI: laptops and desktops whose CPU has no AVX-512.
#include "kernels.inl"

const openelm::Kernels* openelm::avxvnni_kernels() {
#if defined(__AVXVNNI__)
    static const Kernels kernels = table("avxvnni");
    return &kernels;
#else
    return nullptr;
#endif
}
