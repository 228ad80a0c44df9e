// For any CPU that the compiler knows; also what the other kernels are tested against.
#include "kernels.inl"

const openelm::Kernels* openelm::portable_kernels() {
    static const Kernels kernels = table("portable");
    return &kernels;
}
