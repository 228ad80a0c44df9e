// The kernels, written once in terms of vectors.h; the including file says KIND, and has been compiled for its CPU.
#include "kernels.h"
#include "vectors.h"

namespace {

using namespace openelm;

// Registers decide how many tokens are summed at a time.
constexpr int BLOCK_F32 = PARTS == 1 ? 12 : 4, BLOCK_CODES = PARTS == 1 ? 12 : 4;
constexpr long AHEAD = 64 * 16;  // words by which memory is asked for before it is needed

// Unrolled, or the sums of a large block would not stay in registers.
#define EACH_TOKEN _Pragma("GCC unroll 24") for (int t = 0; t < T; t++)

template <int N>
struct Tokens {
    static constexpr int n = N;
};

// body(Tokens<n>) for the n that is asked for.
template <int MOST, class Body>
INLINE void with_tokens(int n, Body body) {
    switch (n) {
        case 1: return body(Tokens<1>{});
        case 2: return body(Tokens<2>{});
        case 3: return body(Tokens<3>{});
        case 4: return body(Tokens<4>{});
        case 8: if constexpr (MOST >= 8) return body(Tokens<8>{}); break;
        case 12: if constexpr (MOST >= 12) return body(Tokens<12>{}); break;
        case 24: if constexpr (MOST >= 24) return body(Tokens<24>{}); break;
    }
}

void f32(const uint32_t* tile, const float* x, long words, int tokens, float* y, long stride) {
    with_tokens<BLOCK_F32>(tokens, [=](auto size) {
        constexpr int T = decltype(size)::n;
        F even[T] = {}, odd[T] = {};
#pragma GCC unroll 4
        for (long w = 0; w < words; w++) {
            __builtin_prefetch(tile + w * LANES + AHEAD);
            const W word = load<W>(tile + w * LANES);
            const F a = lower(word), b = upper(word);
            EACH_TOKEN {
                even[t] = multiply_add(a, set(x[2 * w * T + t]), even[t]);
                odd[t] = multiply_add(b, set(x[(2 * w + 1) * T + t]), odd[t]);
            }
        }
        EACH_TOKEN store(y + t * stride, even[t] + odd[t]);
    });
}

#if defined(__AVX512BF16__)
void bf16(const uint32_t* tile, const uint32_t* x, long words, int tokens, float* y, long stride) {
    with_tokens<24>(tokens, [=](auto size) {
        constexpr int T = decltype(size)::n;
        __m512 total[T] = {};
        for (long w = 0; w < words; w++) {
            const __m512i word = _mm512_loadu_si512(tile + w * LANES);
            EACH_TOKEN
                total[t] = _mm512_dpbf16_ps(total[t], (__m512bh)word, (__m512bh)_mm512_set1_epi32((int)x[w * T + t]));
        }
        EACH_TOKEN _mm512_storeu_ps(y + t * stride, total[t]);
    });
}
#endif

void row8(const uint32_t* tile, Codes x, long groups, int tokens, float* y, long stride) {
    constexpr int WORDS = ROW8_GROUP / 4;
    with_tokens<BLOCK_CODES>(tokens, [=](auto size) {
        constexpr int T = decltype(size)::n;
        F total[T] = {};
        for (long g = 0; g < groups; g++) {
            I dot[T] = {};
#pragma GCC unroll 4
            for (int w = 0; w < WORDS; w++) {
                const long place = g * WORDS + w;
                __builtin_prefetch(tile + place * LANES + AHEAD);
                const W word = load<W>(tile + place * LANES);
                EACH_TOKEN dot[t] = dot4(dot[t], word, x.words[place * T + t]);
            }
            EACH_TOKEN total[t] = multiply_add(to_float(dot[t]), set(x.scale[g * T + t]), total[t]);
        }
        const F scale = load<F>(tile + groups * WORDS * LANES);
        EACH_TOKEN store(y + t * stride, scale * (total[t] - set(128 * x.sum[groups * T + t])));
    });
}

template <int BITS, bool WIDE, int T>
INLINE void affine_block(const uint32_t* tile, int group, Codes x, long groups, float* y, long stride) {
    F total[T] = {};
    for (long g = 0; g < groups; g++) {
        I dot[T] = {}, more[T] = {};  // two sums, or each product would wait for the last
        for (int c = 0; c < group; c += 32) {
#pragma GCC unroll 8
            for (int w = 0; w < BITS; w++, tile += LANES) {
                __builtin_prefetch(tile + AHEAD);
                const W word = load<W>(tile);
                if constexpr (BITS == 8) {
                    EACH_TOKEN (w % 2 ? more : dot)[t] = dot4((w % 2 ? more : dot)[t], word, x.words[w * T + t]);
                } else {
                    const W low = low_codes(word), high = high_codes(word);
                    EACH_TOKEN dot[t] = dot4_small(dot[t], low, x.words[2 * w * T + t]);
                    EACH_TOKEN more[t] = dot4_small(more[t], high, x.words[(2 * w + 1) * T + t]);
                }
            }
            x.words += 8 * T;
        }
        F scale, bias;
        if constexpr (WIDE) {
            scale = load<F>(tile), bias = load<F>(tile + LANES);
            tile += 2 * LANES;
        } else {
            __builtin_prefetch(tile + AHEAD);
            const W both = load<W>(tile);
            scale = lower(both), bias = upper(both);
            tile += LANES;
        }
        EACH_TOKEN {
            total[t] = multiply_add(bias, set(x.sum[g * T + t]), total[t]);
            total[t] = multiply_add(scale, to_float(dot[t] + more[t]) * set(x.scale[g * T + t]), total[t]);
        }
    }
    EACH_TOKEN store(y + t * stride, total[t]);
}

void affine(const uint32_t* tile, Affine form, Codes x, long groups, int tokens, float* y, long stride) {
    with_tokens<BLOCK_CODES>(tokens, [=](auto size) {
        constexpr int T = decltype(size)::n;
        if (form.bits == 4 && !form.wide) return affine_block<4, false, T>(tile, form.group, x, groups, y, stride);
        if (form.bits == 4) return affine_block<4, true, T>(tile, form.group, x, groups, y, stride);
        if (!form.wide) return affine_block<8, false, T>(tile, form.group, x, groups, y, stride);
        affine_block<8, true, T>(tile, form.group, x, groups, y, stride);
    });
}

#if defined(__AVX512BF16__)
void pack_bf16(const float* row, long columns, int tokens, uint32_t* words) {
    for (long c = 0; c < columns; c += LANES) {
        uint32_t eight[8] = {};
        const __mmask16 inside = columns - c < LANES ? (__mmask16)((1u << (columns - c)) - 1) : (__mmask16)0xffff;
        const __m256bh pairs = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(inside, row + c));
        std::memcpy(eight, &pairs, 32);
        for (long w = 0; w < 8 && c + 2 * w < columns; w++) words[(c / 2 + w) * tokens] = eight[w];
    }
}
#endif

void pack_codes(const float* row, long columns, int group, int tokens, uint32_t* words, float* scale, float* sum) {
    float all = 0;
    for (long first = 0, g = 0; first < columns; first += group, g++) {
        F most = set(0);
        for (int c = 0; c < group; c += LANES) most = max(most, magnitude(load<F>(row + first + c)));
        const float edge = largest(most);
        const bool nothing = edge < 1e-30f;  // its inverse would be infinite
        const F inverse = set(nothing ? 0 : 127 / edge);
        I total = {};
        for (int c = 0; c < group; c += LANES) {
            const I codes = round(load<F>(row + first + c) * inverse);
            uint32_t four[4];
            EACH {
                total.part[i] += codes.part[i];
                const Bytes bytes = __builtin_convertvector(codes.part[i], Bytes);
                std::memcpy((char*)four + i * PER_PART, &bytes, PER_PART);
            }
            for (int w = 0; w < 4; w++) words[((first + c) / 4 + w) * tokens] = four[w];
        }
        scale[g * tokens] = nothing ? 0 : edge / 127;
        sum[g * tokens] = ::sum(to_float(total)) * scale[g * tokens];
        all += sum[g * tokens];
    }
    sum[columns / group * tokens] = all;
}

void norm(const float* row, const float* gain, long length, float* out) {
    F squares = set(0);
    long whole = length / LANES * LANES;
    for (long c = 0; c < whole; c += LANES) squares = multiply_add(load<F>(row + c), load<F>(row + c), squares);
    float total = sum(squares);
    for (long c = whole; c < length; c++) total += row[c] * row[c];
    const float scale = 1 / __builtin_sqrtf(total / (float)length + 1e-6f);
    for (long c = 0; c < whole; c += LANES) store(out + c, load<F>(row + c) * set(scale) * load<F>(gain + c));
    for (long c = whole; c < length; c++) out[c] = row[c] * scale * gain[c];
}

void swiglu(const float* gate, const float* up, long length, float* out) {
    for (long c = 0; c < length; c += LANES) {
        const F a = load<F>(gate + c);
        store(out + c, a / (set(1) + exponential(set(0) - max(a, set(-87)))) * load<F>(up + c));
    }
}

void softmax(float* row, long length) {
    float last[LANES];
    const long whole = length / LANES * LANES, rest = length - whole;
    for (int i = 0; i < LANES; i++) last[i] = i < rest ? row[whole + i] : -1e30f;
    F most = load<F>(last);
    for (long c = 0; c < whole; c += LANES) most = max(most, load<F>(row + c));
    const F edge = set(largest(most));
    F total = set(0);
    for (long c = 0; c < whole; c += LANES) {
        const F power = exponential(load<F>(row + c) - edge);
        store(row + c, power);
        total = total + power;
    }
    store(last, exponential(load<F>(last) - edge));
    float all = sum(total);
    for (long i = 0; i < rest; i++) all += last[i];
    for (long c = 0; c < whole; c += LANES) store(row + c, load<F>(row + c) * set(1 / all));
    for (long i = 0; i < rest; i++) row[whole + i] = last[i] / all;
}

uint64_t sum_words(const uint64_t* data, long length) {
    W total[4] = {};
    const uint32_t* words = (const uint32_t*)data;
    for (long c = 0; c + 64 <= 2 * length; c += 64)
        for (int k = 0; k < 4; k++) {
            __builtin_prefetch(words + c + 16 * k + AHEAD);
            const W word = load<W>(words + c + 16 * k);
            EACH total[k].part[i] += word.part[i];
        }
    uint32_t lane[16];
    uint64_t all = 0;
    for (int k = 0; k < 4; k++) {
        store(lane, total[k]);
        for (uint32_t value : lane) all += value;
    }
    return all;
}

float value(uint16_t bf16) {
    const uint32_t bits = (uint32_t)bf16 << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

float round_row8(const uint16_t* row, long columns, uint8_t* codes) {
    uint16_t edge = 0;  // without their signs, bf16 numbers are in the order of their bits
    for (long c = 0; c < columns; c++) edge = edge > (row[c] & 0x7fff) ? edge : (uint16_t)(row[c] & 0x7fff);
    const float scale = value(edge) / 127, inverse = scale > 1e-30f ? 1 / scale : 0;
    for (long c = 0; c < columns; c++) {
        const float moved = value(row[c]) * inverse + ROUND;
        int32_t bits;
        std::memcpy(&bits, &moved, 4);
        codes[c] = (uint8_t)(bits - ROUND_BITS + 128);
    }
    return scale;
}

void round_group4(const uint16_t* group, int columns, uint8_t* codes, float* scale, float* bias) {
    float low = value(group[0]), high = low;
    for (int c = 1; c < columns; c++) {
        const float x = value(group[c]);
        low = x < low ? x : low, high = x > high ? x : high;
    }
    const bool from_low = __builtin_fabsf(low) > __builtin_fabsf(high);
    float step = (high - low) / 15;
    step = step < 1e-7f ? 1e-7f : step;
    step = from_low ? step : -step;
    const float edge = from_low ? low : high, steps = round(edge / step);
    *scale = steps == 0 ? step : edge / steps;
    *bias = steps == 0 ? 0 : edge;
    for (int c = 0; c < columns; c++) {
        const float code = round((value(group[c]) - *bias) / *scale);
        codes[c] = (uint8_t)(code < 0 ? 0 : code > 15 ? 15 : code);
    }
}

Kernels table(const char* name) {
    Kernels k = {};
    k.name = name;
    k.block_f32 = BLOCK_F32, k.block_codes = BLOCK_CODES;
    k.f32 = f32, k.row8 = row8, k.affine = affine;
    k.pack_codes = pack_codes, k.norm = norm, k.swiglu = swiglu, k.softmax = softmax, k.sum = sum_words;
    k.round_row8 = round_row8, k.round_group4 = round_group4;
    return k;
}

}  // namespace
