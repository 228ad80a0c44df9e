// What the decoder computes with: a table of functions, one for each kind of CPU, chosen at run time.
//
// A matrix stands in tiles of 16 rows. A tile is a sequence of vectors of 16 words of 32 bits, one word a row, so that
// a product with a vector needs no sum across lanes. A word holds the next 2 columns of its row in bf16, 4 in 8 bits or
// 8 in 4 bits. Three forms of tile:
//   bf16    the words
//   row8    the words, codes with 128 for zero; at the end a vector of the rows' scales (fp32)
//   affine  after the words of each group of columns a vector of scales and biases (bf16, one word holds both), or
//           one of scales and one of biases (fp32): a value is code * scale + bias, as mlx-lm has it
//
// Activations are packed for a block of tokens: [column or word][token]. In 8 bits, a group of them shares a scale.
#pragma once
#include <cstdint>

namespace openelm {

constexpr int LANES = 16;
constexpr int ROW8_GROUP = 64;     // columns that share an activation scale where the weights have none by group
constexpr int LARGEST_BLOCK = 24;  // tokens that any kernel takes at once

struct Codes {                 // activations in 8 bits
    const uint32_t* words;     // [columns / 4][tokens]
    const float* scale;        // [groups][tokens]
    const float* sum;          // [groups][tokens], of the values that the codes stand for; then [tokens], of all groups
};

struct Affine {
    int bits, group;  // 4 or 8; columns
    bool wide;        // scales and biases in fp32
};

struct Kernels {
    const char* name;
    int block_f32, block_bf16, block_codes;  // most tokens that the kernels below take; 0: there is no such kernel

    // One tile times a block of tokens: y[token * stride + lane]. `tokens` is one that block_size gives.
    void (*f32)(const uint32_t* tile, const float* x, long words, int tokens, float* y, long stride);
    void (*bf16)(const uint32_t* tile, const uint32_t* x, long words, int tokens, float* y, long stride);
    void (*row8)(const uint32_t* tile, Codes x, long groups, int tokens, float* y, long stride);
    void (*affine)(const uint32_t* tile, Affine form, Codes x, long groups, int tokens, float* y, long stride);

    // One token's row into its place in a packed block; pointers are at the token, whose values stand `tokens` apart.
    void (*pack_bf16)(const float* row, long columns, int tokens, uint32_t* words);
    void (*pack_codes)(const float* row, long columns, int group, int tokens, uint32_t* words, float* scale,
                       float* sum);

    // Lengths are multiples of 16 but for softmax and norm.
    void (*norm)(const float* row, const float* gain, long length, float* out);
    void (*swiglu)(const float* gate, const float* up, long length, float* out);
    void (*softmax)(float* row, long length);
    uint64_t (*sum)(const uint64_t* data, long length);  // reads, and does little else

    // Rounding at load: a row of bf16 to 8 bits (its scale is returned), a group to 4 bits as mlx rounds it.
    float (*round_row8)(const uint16_t* row, long columns, uint8_t* codes);
    void (*round_group4)(const uint16_t* group, int columns, uint8_t* codes, float* scale, float* bias);
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();    // null where the CPU, or the compiler, has no such instructions
const Kernels* avxvnni_kernels();
const Kernels* avx512_kernels();

// The kernels of that name, or the fastest that this CPU has where it is empty; null where there are none.
const Kernels* find_kernels(const char* name);

// The smallest number of tokens, not under n (or `most`), that kernels are made for.
inline int block_size(long n, int most) {
    const int sizes[] = {1, 2, 3, 4, 8, 12, 24};
    for (int size : sizes)
        if (size >= n || size >= most) return size;
    return most;
}

}  // namespace openelm
