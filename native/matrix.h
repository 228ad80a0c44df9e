// A matrix in tiles (kernels.h), made once at load.
#pragma once
#include <cstddef>
#include <memory>
#include <new>

#include "kernels.h"
#include "pool.h"

namespace openelm {

// Memory that begins at a page's edge and is zero; large ones in large pages where the system has them.
class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(size_t bytes);
    template <class T>
    T* as() const { return static_cast<T*>(data.get()); }

  private:
    struct Free {
        size_t bytes;
        void operator()(void* data) const;
    };
    std::unique_ptr<void, Free> data{nullptr, Free{0}};
};

// Hands out parts of large buffers, so that small matrices stand in large pages too.
class Arena {
  public:
    uint32_t* take(size_t words);

  private:
    std::vector<Buffer> chunks;
    size_t used = 0, size = 0;  // bytes of the last
};

enum class Form { none, bf16, row8, affine };

struct Matrix {
    Matrix() = default;
    // Rows stand in `parts` of equal size, each filled up to whole tiles; tiles go through them one part after the
    // other, or `in_turn`.
    Matrix(long rows, long columns, long parts = 1, bool in_turn = false)
        : rows(rows), columns(columns), parts(parts), in_turn(in_turn) {}

    // From rows of bf16, as they are (16 bits) or rounded (8: scales by row; 4: by group, where the groups fit).
    void fill(const uint16_t* values, int bits, int group, const Kernels& kernels, Pool& pool, Arena& arena);
    // From mlx-lm's words, scales and biases; these are bf16, or fp32 where they are `wide`.
    void fill(const uint32_t* words, const void* scales, const void* biases, Affine affine, Pool& pool, Arena& arena);

    // A row's values; out has room for `width` of them.
    void read_row(long row, float* out) const;

    const uint32_t* tile(long index) const { return data + index * tile_words; }
    size_t bytes() const { return (size_t)tiles * tile_words * 4; }
    long groups() const { return form == Form::row8 ? width / ROW8_GROUP : width / affine.group; }

    long rows = 0, columns = 0, parts = 1;
    bool in_turn = false;
    Form form = Form::none;
    Affine affine = {};
    long width = 0;  // columns, filled up with zeros to whole words and groups
    long tiles = 0, tile_words = 0;
    uint32_t* data = nullptr;  // the arena's

  private:
    void lay_out(Form form, Affine affine, Arena& arena);
    long row_of(long tile, int lane) const;  // -1 where the tile is filled up
    // write(row, place, codes) for all rows: its words follow `place` LANES apart; codes is room for `width` of them.
    template <class Write>
    void each_row(Pool& pool, Write write);
};

}  // namespace openelm
