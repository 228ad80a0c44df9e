#include "matrix.h"

#include <algorithm>
#include <cstring>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace openelm {

namespace {

constexpr size_t PAGE = 4096, LARGE_PAGE = 1 << 21;

float value(uint32_t bf16) {
    const uint32_t bits = bf16 << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

uint32_t nearest_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Eight codes, the first lowest -> the first four in the lower halves of the bytes, the others in the upper.
uint32_t in_tile_order(uint32_t word) {
    const auto spread = [](uint32_t x) {
        x = (x | x << 8) & 0x00ff00ff;
        return (x | x << 4) & 0x0f0f0f0f;
    };
    return spread(word & 0xffff) | spread(word >> 16) << 4;
}

}  // namespace

Buffer::Buffer(size_t bytes) {
    const size_t align = bytes >= 2 * LARGE_PAGE ? LARGE_PAGE : PAGE;
    bytes = (bytes + align - 1) / align * align;
#if defined(__linux__)
    // Mapped a page too long and cut to its edge. Zero pages cost nothing until they are written.
    const size_t mapped = bytes + align;
    char* all = static_cast<char*>(mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (all == MAP_FAILED) throw std::bad_alloc();
    char* first = all + (align - reinterpret_cast<uintptr_t>(all) % align) % align;
    if (first > all) munmap(all, first - all);
    if (all + mapped > first + bytes) munmap(first + bytes, all + mapped - first - bytes);
    if (align == LARGE_PAGE) madvise(first, bytes, MADV_HUGEPAGE);
#else
    char* first = static_cast<char*>(::operator new(bytes, std::align_val_t(PAGE)));
    std::memset(first, 0, bytes);
#endif
    data = {first, Free{bytes}};
}

void Buffer::Free::operator()(void* data) const {
#if defined(__linux__)
    munmap(data, bytes);
#else
    ::operator delete(data, std::align_val_t(PAGE));
#endif
}

uint32_t* Arena::take(size_t words) {
    const size_t bytes = (words * 4 + 63) / 64 * 64;
    if (used + bytes > size) {
        size = std::max<size_t>(bytes, 64 << 20), used = 0;  // what is never written takes no memory
        chunks.emplace_back(size);
    }
    used += bytes;
    return chunks.back().as<uint32_t>() + (used - bytes) / 4;
}

void Matrix::lay_out(Form form_, Affine affine_, Arena& arena) {
    form = form_, affine = affine_;
    const auto up = [](long n, long step) { return (n + step - 1) / step * step; };
    width = up(columns, form == Form::bf16 ? 2 : form == Form::row8 ? ROW8_GROUP : affine.group);
    tiles = up(rows / parts, LANES) / LANES * parts;
    if (form == Form::bf16) tile_words = width / 2 * LANES;
    if (form == Form::row8) tile_words = (width / 4 + 1) * LANES;
    if (form == Form::affine) tile_words = (width * affine.bits / 32 + groups() * (affine.wide ? 2 : 1)) * LANES;
    data = arena.take(tiles * tile_words);
}

long Matrix::row_of(long tile, int lane) const {
    const long size = rows / parts, part = in_turn ? tile % parts : tile / (tiles / parts);
    const long row = (in_turn ? tile / parts : tile % (tiles / parts)) * LANES + lane;
    return row < size ? part * size + row : -1;
}

template <class Write>
void Matrix::each_row(Pool& pool, Write write) {
    pool.run([&](int thread) {
        std::vector<uint8_t> codes(width);
        for (long t = tiles * thread / pool.threads; t < tiles * (thread + 1) / pool.threads; t++)
            for (int lane = 0; lane < LANES; lane++)
                if (const long row = row_of(t, lane); row >= 0)
                    write(row, data + t * tile_words + lane, codes.data());
    });
}

void Matrix::fill(const uint16_t* values, int bits, int group, const Kernels& kernels, Pool& pool, Arena& arena) {
    if (bits == 4 && columns % group) bits = 16;  // mlx-lm leaves such matrices as they are
    if (bits == 16) {
        lay_out(Form::bf16, {}, arena);
        each_row(pool, [&](long row, uint32_t* place, uint8_t*) {
            const uint16_t* from = values + row * columns;
            for (long c = 0; c < columns; c += 2, place += LANES)
                *place = from[c] | (c + 1 < columns ? (uint32_t)from[c + 1] << 16 : 0);
        });
    } else if (bits == 8) {
        lay_out(Form::row8, {}, arena);
        each_row(pool, [&](long row, uint32_t* place, uint8_t* codes) {
            const float scale = kernels.round_row8(values + row * columns, columns, codes);
            for (long c = 0; c < width; c += 4, place += LANES) std::memcpy(place, codes + c, 4);
            std::memcpy(place, &scale, 4);
        });
    } else {
        lay_out(Form::affine, {4, group, false}, arena);
        each_row(pool, [&](long row, uint32_t* place, uint8_t* codes) {
            for (long first = 0; first < columns; first += group) {
                float scale, bias;
                kernels.round_group4(values + row * columns + first, group, codes, &scale, &bias);
                for (int c = 0; c < group; c += 8, place += LANES) {
                    *place = 0;
                    for (int k = 0; k < 4; k++)
                        *place |= (uint32_t)(codes[c + k] | codes[c + 4 + k] << 4) << (8 * k);
                }
                *place = nearest_bf16(scale) | nearest_bf16(bias) << 16;
                place += LANES;
            }
        });
    }
}

void Matrix::fill(const uint32_t* words, const void* scales, const void* biases, Affine form_, Pool& pool,
                  Arena& arena) {
    lay_out(Form::affine, form_, arena);
    const long group_words = affine.group * affine.bits / 32, count = groups();
    each_row(pool, [&](long row, uint32_t* place, uint8_t*) {
        const uint32_t* from = words + row * count * group_words;
        for (long g = 0; g < count; g++) {
            for (long w = 0; w < group_words; w++, place += LANES)
                *place = affine.bits == 4 ? in_tile_order(*from++) : *from++;
            const long at = row * count + g;
            if (affine.wide) {
                place[0] = static_cast<const uint32_t*>(scales)[at];
                place[LANES] = static_cast<const uint32_t*>(biases)[at];
                place += 2 * LANES;
            } else {
                const auto* scale = static_cast<const uint16_t*>(scales);
                const auto* bias = static_cast<const uint16_t*>(biases);
                *place = scale[at] | (uint32_t)bias[at] << 16;
                place += LANES;
            }
        }
    });
}

void Matrix::read_row(long row, float* out) const {
    const uint32_t* place = tile(row / LANES) + row % LANES;
    if (form == Form::bf16) {
        for (long c = 0; c < width; c += 2, place += LANES)
            out[c] = value(*place & 0xffff), out[c + 1] = value(*place >> 16);
    } else if (form == Form::row8) {
        float scale;
        std::memcpy(&scale, place + width / 4 * LANES, 4);
        for (long c = 0; c < width; c += 4, place += LANES)
            for (int k = 0; k < 4; k++) out[c + k] = scale * (float)((int)(*place >> (8 * k) & 255) - 128);
    } else {
        const long group_words = affine.group * affine.bits / 32;
        for (long g = 0; g < groups(); g++) {
            const uint32_t* last = place + group_words * LANES;
            float scale = value(*last & 0xffff), bias = value(*last >> 16);
            if (affine.wide) std::memcpy(&scale, last, 4), std::memcpy(&bias, last + LANES, 4);
            for (long w = 0; w < group_words; w++, place += LANES, out += affine.bits == 4 ? 8 : 4)
                for (int k = 0; k < 4; k++) {
                    const uint32_t byte = *place >> (8 * k) & 255;
                    if (affine.bits == 4) out[k + 4] = scale * (float)(byte >> 4) + bias;
                    out[k] = scale * (float)(affine.bits == 4 ? byte & 15 : byte) + bias;
                }
            place += (affine.wide ? 2 : 1) * LANES;
        }
    }
}

}  // namespace openelm
