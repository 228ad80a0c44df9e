// Sixteen lanes, as one, two or four registers of the CPU that the including file is compiled for.
// Everything has internal linkage: the same name compiled for two CPUs must not become one function at link time. For
// the same reason these files use no template of the standard library.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
constexpr int PARTS = 64 / BYTES, PER_PART = BYTES / 4;

typedef float Floats __attribute__((vector_size(BYTES), may_alias));
typedef int32_t Ints __attribute__((vector_size(BYTES), may_alias));
typedef uint32_t Words __attribute__((vector_size(BYTES), may_alias));
typedef int8_t Bytes __attribute__((vector_size(PER_PART), may_alias));

struct F { Floats part[PARTS]; };
struct I { Ints part[PARTS]; };
struct W { Words part[PARTS]; };

#define EACH for (int i = 0; i < PARTS; i++)
#define INLINE inline __attribute__((always_inline))

template <class V, class T>
INLINE V load(const T* from) {
    V a;
    EACH std::memcpy(&a.part[i], from + i * PER_PART, BYTES);
    return a;
}
template <class V, class T>
INLINE void store(T* to, V a) {
    EACH std::memcpy(to + i * PER_PART, &a.part[i], BYTES);
}
INLINE F set(float x) {
    F a;
    EACH a.part[i] = x - Floats{};
    return a;
}
INLINE F operator+(F a, F b) { EACH a.part[i] += b.part[i]; return a; }
INLINE I operator+(I a, I b) { EACH a.part[i] += b.part[i]; return a; }
INLINE F operator-(F a, F b) { EACH a.part[i] -= b.part[i]; return a; }
INLINE F operator*(F a, F b) { EACH a.part[i] *= b.part[i]; return a; }
INLINE F operator/(F a, F b) { EACH a.part[i] /= b.part[i]; return a; }
// a * b + c, rounded once where the CPU can. Nothing else is fused: what is rounded to codes is the same on all.
INLINE F multiply_add(F a, F b, F c) {
#if defined(__AVX512F__)
    c.part[0] = (Floats)_mm512_fmadd_ps((__m512)a.part[0], (__m512)b.part[0], (__m512)c.part[0]);
#elif defined(__AVX2__)
    EACH c.part[i] = (Floats)_mm256_fmadd_ps((__m256)a.part[i], (__m256)b.part[i], (__m256)c.part[i]);
#else
    EACH c.part[i] += a.part[i] * b.part[i];
#endif
    return c;
}
INLINE F max(F a, F b) { EACH a.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i]; return a; }
INLINE F magnitude(F a) { EACH a.part[i] = (Floats)((Words)a.part[i] & 0x7fffffffu); return a; }
INLINE F to_float(I a) { F b; EACH b.part[i] = __builtin_convertvector(a.part[i], Floats); return b; }

// Across lanes, always in the same order.
INLINE float sum(F a) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)a.part[0]);
#else
    float lane[16];
    store(lane, a);
    for (int step = 8; step; step /= 2)
        for (int i = 0; i < step; i++) lane[i] += lane[i + step];
    return lane[0];
#endif
}
INLINE float largest(F a) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)a.part[0]);
#else
    float lane[16];
    store(lane, a);
    for (int step = 8; step; step /= 2)
        for (int i = 0; i < step; i++) lane[i] = lane[i] > lane[i + step] ? lane[i] : lane[i + step];
    return lane[0];
#endif
}

// Words of two bf16 numbers: the one in the lower half, and the one in the upper.
INLINE F lower(W a) { F b; EACH b.part[i] = (Floats)(a.part[i] << 16); return b; }
INLINE F upper(W a) { F b; EACH b.part[i] = (Floats)(a.part[i] & 0xffff0000u); return b; }
// Words of eight codes of 4 bits: the four in the lower halves of the bytes, and in the upper.
INLINE W low_codes(W a) { EACH a.part[i] &= 0x0f0f0f0fu; return a; }
INLINE W high_codes(W a) { EACH a.part[i] = (a.part[i] >> 4) & 0x0f0f0f0fu; return a; }

// Adding it leaves a number of at most 2^22, rounded to nearest and even, in the low bits.
constexpr float ROUND = 12582912.0f;
constexpr int32_t ROUND_BITS = 0x4b400000;
INLINE I round(F a) { I b; EACH b.part[i] = (Ints)(a.part[i] + ROUND) - ROUND_BITS; return b; }
INLINE float round(float a) { return (a + ROUND) - ROUND; }

// e^x to 2e-7 for x <= 88; 0 below -87. e^x = 2^n e^r with |r| <= ln 2 / 2, and e^r by its series.
INLINE F exponential(F x) {
    x = max(x, set(-87.0f));
    I n = round(x * set(1.44269504f));
    F r = multiply_add(to_float(n), set(-0.693359375f), x);
    r = multiply_add(to_float(n), set(2.12194440e-4f), r);
    F y = set(1.0f / 5040);
    const float series[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (float coefficient : series) y = multiply_add(y, r, set(coefficient));
    EACH y.part[i] = (Floats)((Ints)y.part[i] + (n.part[i] << 23));
    return y;
}

// sum += the dot product of four unsigned codes a lane with the four signed ones in x.
INLINE I dot4(I sum, W codes, uint32_t x) {
#if defined(__AVX512VNNI__)
    sum.part[0] = (Ints)_mm512_dpbusd_epi32((__m512i)sum.part[0], (__m512i)codes.part[0], _mm512_set1_epi32((int)x));
#elif defined(__AVXVNNI__)
    const __m256i all = _mm256_set1_epi32((int)x);
    EACH sum.part[i] = (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum.part[i], (__m256i)codes.part[i], all);
#elif defined(__AVX2__)
    // Products of 8 bit codes in pairs would overflow 16 bits: widen both, the even columns and the odd ones.
    const __m256i all = _mm256_set1_epi32((int)x);
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8), odd = _mm256_srai_epi16(all, 8);
    EACH {
        const __m256i a = _mm256_and_si256((__m256i)codes.part[i], _mm256_set1_epi16(255));
        const __m256i b = _mm256_srli_epi16((__m256i)codes.part[i], 8);
        const __m256i pairs = _mm256_add_epi32(_mm256_madd_epi16(a, even), _mm256_madd_epi16(b, odd));
        sum.part[i] = (Ints)_mm256_add_epi32((__m256i)sum.part[i], pairs);
    }
#else
    for (int column = 0; column < 4; column++) {
        const int32_t factor = (int8_t)(x >> (8 * column));
        EACH sum.part[i] += (Ints)((codes.part[i] >> (8 * column)) & 255u) * factor;
    }
#endif
    return sum;
}

// The same for codes under 128.
INLINE I dot4_small(I sum, W codes, uint32_t x) {
#if defined(__AVX2__) && !defined(__AVXVNNI__) && !defined(__AVX512VNNI__)
    const __m256i all = _mm256_set1_epi32((int)x), ones = _mm256_set1_epi16(1);
    EACH {
        const __m256i pairs = _mm256_maddubs_epi16((__m256i)codes.part[i], all);
        sum.part[i] = (Ints)_mm256_add_epi32((__m256i)sum.part[i], _mm256_madd_epi16(pairs, ones));
    }
    return sum;
#else
    return dot4(sum, codes, x);
#endif
}

}  // namespace
