// The pass of a block of tokens through all layers, on all threads at once.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "model.h"

namespace openelm {

namespace {

// Where up to so many tokens' logits are all wanted (they are drafts), activations stay in fp32 as in decoding: memory is
// what takes the time. A prompt's never do, so that it does not matter in which pieces it comes.
constexpr long EXACT_TOKENS = 4;
constexpr int SOON = 64;  // vectors of a matrix that are asked for before it is read

uint16_t nearest_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace

// ---------------------------------------------------------------------------------------------------- products

bool Model::in_pairs(const Matrix& m, const Input& x) const {
    return m.form == Form::bf16 && k.block_bf16 && !x.exact;
}

int Model::most_tokens(const Matrix& m, const Input& x) const {
    return in_pairs(m, x) ? k.block_bf16 : m.form == Form::bf16 ? k.block_f32 : k.block_codes;
}

// One token into its place in its block, normalised where there is a gain.
void Model::pack(const Matrix& m, const Input& x, long token, const Packed& to, Scratch& own) const {
    const int most = most_tokens(m, x);
    const long t = token % most, first = token - t;
    const int size = block_size(x.tokens - first, most);
    const bool pairs = in_pairs(m, x);
    const Place at = place(m, to, first, pairs);
    const float* from = x.values + token * x.stride;
    float* row = own.row.as<float>();
    if (x.gain) k.norm(from, x.gain->data(), m.columns, row);
    else std::memcpy(row, from, m.columns * 4);
    std::fill(row + m.columns, row + m.width, 0.0f);
    if (pairs) {
        k.pack_bf16(row, m.width, size, at.words + t);
    } else if (m.form == Form::bf16) {
        float* out = reinterpret_cast<float*>(at.words) + t;
        for (long c = 0; c < m.width; c++) out[c * size] = row[c];
    } else {
        const int group = m.form == Form::row8 ? ROW8_GROUP : m.affine.group;
        k.pack_codes(row, m.width, group, size, at.words + t, at.scale + t, at.sum + t);
    }
}

// Where the block that begins with a token stands; all before it are full.
Model::Place Model::place(const Matrix& m, const Packed& packed, long first, bool pairs) const {
    const long words = m.form != Form::bf16 ? m.width / 4 : pairs ? m.width / 2 : m.width;
    const long groups = m.form != Form::bf16 ? m.groups() : 0;
    return {packed.words.as<uint32_t>() + first * words, packed.scale.as<float>() + first * groups,
            packed.sum.as<float>() + first * (groups + 1)};
}

void Model::product(const Matrix& m, long tile, const Place& x, int size, bool pairs, float* y) const {
    const Codes codes{x.words, x.scale, x.sum};
    const uint32_t* weights = m.tile(tile);
    if (pairs) k.bf16(weights, x.words, m.width / 2, size, y, LANES);
    else if (m.form == Form::bf16) k.f32(weights, reinterpret_cast<float*>(x.words), m.width / 2, size, y, LANES);
    else if (m.form == Form::row8) k.row8(weights, codes, m.groups(), size, y, LANES);
    else k.affine(weights, m.affine, codes, m.groups(), size, y, LANES);
}

// An input as the kernels read it. Whoever multiplies by a matrix asks for it first, on all threads.
const Model::Packed& Model::packed(const Matrix& m, const Input& x, int thread) {
    Scratch& own = scratch[thread];
    const uint32_t* soon = m.tile(m.tiles * thread / pool.threads);  // comes while the input is made ready
    for (int line = 0; line < SOON; line++) __builtin_prefetch(soon + line * LANES);
    if (x.tokens == 1) {  // each thread packs it for itself, which is quicker than to wait
        pack(m, x, 0, own.packed, own);
        return own.packed;
    }
    for (long t = thread; t < x.tokens; t += pool.threads) pack(m, x, t, shared, own);
    pool.barrier();
    return shared;
}

// A tile times all tokens of x: y = m x; or y += m x; or y = silu(gate) * up, where it and the next hold the two.
void Model::multiply(const Matrix& m, long tile, const Input& x, const Packed& packed, const Output& y, int thread) {
    const bool pairs = in_pairs(m, x);
    const int most = most_tokens(m, x);
    float* out = scratch[thread].tile.as<float>();
    float* second = out + LARGEST_BLOCK * LANES;
    for (long first = 0; first < x.tokens; first += most) {
        const int size = block_size(x.tokens - first, most);
        const Place at = place(m, packed, first, pairs);
        product(m, tile, at, size, pairs, out);
        if (y.into == Into::swiglu) product(m, tile + 1, at, size, pairs, second);
        for (int t = 0; t < size && first + t < x.tokens; t++) {
            float* to = y.values + (first + t) * y.stride + (y.into == Into::swiglu ? tile / 2 : tile) * LANES;
            if (y.into == Into::store) std::memcpy(to, out + t * LANES, LANES * 4);
            else if (y.into == Into::swiglu) k.swiglu(out + t * LANES, second + t * LANES, LANES, to);
            else for (int i = 0; i < LANES; i++) to[i] += out[t * LANES + i];
        }
    }
}

void Model::multiply(const Matrix& m, const Input& x, const Output& y, int thread) {
    const Packed& input = packed(m, x, thread);
    const int step = y.into == Into::swiglu ? 2 : 1;
    pool.deal(thread, m.tiles / step, [&](long i) { multiply(m, i * step, x, input, y, thread); });
}

// --------------------------------------------------------------------------------------------------- attention

// Queries, keys and values; each head is put to its place as soon as it is there.
void Model::project_heads(const Pass& pass, int index, const Input& x, int thread) {
    const Layer& layer = layers[index];
    const Packed& input = packed(layer.qkv, x, thread);
    const long heads = layer.query_heads + 2 * layer.kv_heads, tiles = layer.qkv.tiles / heads;
    pool.deal(thread, heads, [&](long head) {
        for (long tile = head * tiles; tile < (head + 1) * tiles; tile++)
            multiply(layer.qkv, tile, x, input, {Into::store, qkv.as<float>(), qkv_stride}, thread);
        for (long t = 0; t < x.tokens; t++) place_head(pass, index, (int)head, t);
    });
}

// A query or key normalised and turned by its position; a key or value put into the cache.
void Model::place_head(const Pass& pass, int index, int head, long t) {
    const Layer& layer = layers[index];
    const int H = layer.query_heads, G = layer.kv_heads, K = geometry.head_dim, half = K / 2;
    const long position = pass.tokens[t].position;
    const Sequence& sequence = *pass.tokens[t].sequence;
    float* row = qkv.as<float>() + t * qkv_stride + head * head_stride;
    if (head < H + G) {
        if (geometry.qk_norm) k.norm(row, (head < H ? layer.q_norm : layer.k_norm).data(), K, row);
        const float *cosines = turns.as<float>() + t * K, *sines = cosines + half;
        for (int d = 0; d < half; d++) {
            const float left = row[d], right = row[d + half];
            row[d] = left * cosines[d] - right * sines[d];
            row[d + half] = right * cosines[d] + left * sines[d];
        }
    }
    if (head < H) {
        const float scale = 1 / std::sqrt((float)K);
        for (int d = 0; d < K; d++) row[d] *= scale;
    } else if (head < H + G) {
        uint32_t* word = sequence.keys(index, head - H) + position / LANES * half * LANES + position % LANES;
        for (int d = 0; d < K; d += 2)
            word[d / 2 * LANES] = nearest_bf16(row[d]) | (uint32_t)nearest_bf16(row[d + 1]) << 16;
    } else {
        const bool last = pass.apart || t + 1 == (long)pass.tokens.size();
        for (int d = 0; d < K; d++) {
            const long word = (d / LANES * sequence.padded / 2 + position / 2) * LANES + d % LANES;
            uint16_t* pair = reinterpret_cast<uint16_t*>(sequence.values(index, head - H - G) + word);
            pair[position % 2] = nearest_bf16(row[d]);
            // What an earlier, longer text left there would be multiplied by 0, but may not be finite.
            if (last && position % 2 == 0) pair[1] = 0;
        }
    }
}

// A column is a query: head c % n of the n that share the keys, of token c / n. A block of columns is of one sequence.
void Model::attend(const Pass& pass, int index, int thread) {
    const Layer& layer = layers[index];
    const int G = layer.kv_heads, share = layer.query_heads / G, most = k.block_f32, threads = pool.threads;
    const long tokens = (long)pass.tokens.size();
    if (pass.apart) {  // each thread has some heads of every text: they may be of any length
        const int H = layer.query_heads, end = H * (thread + 1) / threads;
        for (long t = 0; t < tokens; t++)
            for (int head = H * thread / threads, count; head < end; head += count) {
                count = std::min({end - head, share - head % share, most});
                attend_block(pass, index, head / share, t * share + head % share, count, thread);
            }
        return;
    }
    const long columns = tokens * share, blocks = (columns + most - 1) / most;
    for (long i = thread; i < blocks * G; i += threads) {  // later tokens cost more: dealt out in turn
        const long first = i / G * most;
        attend_block(pass, index, (int)(i % G), first, (int)std::min<long>(most, columns - first), thread);
    }
}

void Model::attend_block(const Pass& pass, int index, int group, long first, int count, int thread) {
    Scratch& own = scratch[thread];
    const int K = geometry.head_dim, share = layers[index].query_heads / layers[index].kv_heads;
    const int size = block_size(count, k.block_f32);
    const Token& last = pass.tokens[(first + count - 1) / share];
    const Sequence& sequence = *last.sequence;
    const long padded = sequence.padded, longest = last.position + 1;
    float *query = own.query.as<float>(), *scores = own.scores.as<float>(), *weights = own.weights.as<float>();
    for (int c = 0; c < count; c++) {
        const long t = (first + c) / share, head = group * share + (first + c) % share;
        const float* row = qkv.as<float>() + t * qkv_stride + head * head_stride;
        for (int d = 0; d < K; d++) query[d * size + c] = row[d];
    }
    for (long tile = 0; tile * LANES < longest; tile++)
        k.f32(sequence.keys(index, group) + tile * K / 2 * LANES, query, K / 2, size, scores + tile * LANES, padded);
    const long pairs = (longest + 1) / 2;
    for (int c = 0; c < count; c++) {
        const long seen = pass.tokens[(first + c) / share].position + 1;
        float* row = scores + c * padded;
        k.softmax(row, seen);
        for (long s = 0; s < seen; s++) weights[s * size + c] = row[s];
        for (long s = seen; s < 2 * pairs; s++) weights[s * size + c] = 0;
    }
    float* out = own.tile.as<float>();
    for (int d = 0; d < K; d += LANES) {
        k.f32(sequence.values(index, group) + d * padded / 2, weights, pairs, size, out, LANES);
        for (int c = 0; c < count; c++) {
            const long t = (first + c) / share, head = group * share + (first + c) % share;
            float* to = attended.as<float>() + t * attended_stride + head * K + d;
            std::memcpy(to, out + c * LANES, std::min(LANES, K - d) * 4);
        }
    }
}

// ---------------------------------------------------------------------------------------------------- the pass

void Model::run(const Pass& pass, int thread) {
    const int K = geometry.head_dim, half = K / 2;
    const long T = (long)pass.tokens.size(), D = hidden_stride;
    const bool exact = pass.apart || (pass.all && T <= EXACT_TOKENS);
    float* x = hidden.as<float>();
    for (long t = thread; t < T; t += pool.threads) {
        float *row = scratch[thread].row.as<float>(), *turn = turns.as<float>() + t * K;
        embedding.read_row(pass.tokens[t].id, row);
        std::memcpy(x + t * D, row, geometry.model_dim * 4);
        for (int d = 0; d < half; d++) {
            const float angle = (float)pass.tokens[t].position * geometry.rope[d];
            turn[d] = std::cos(angle), turn[d + half] = std::sin(angle);
        }
    }
    pool.barrier();
    for (int i = 0; i < (int)layers.size(); i++) {
        const Layer& layer = layers[i];
        project_heads(pass, i, {x, D, &layer.attn_norm, T, exact}, thread);
        pool.barrier();
        attend(pass, i, thread);
        pool.barrier();
        const Output add{Into::add, x, D}, wide{Into::swiglu, ffn.as<float>(), ffn_stride};
        multiply(layer.out, {attended.as<float>(), attended_stride, nullptr, T, exact}, add, thread);
        pool.barrier();
        multiply(layer.proj_1, {x, D, &layer.ffn_norm, T, exact}, wide, thread);
        pool.barrier();
        multiply(layer.proj_2, {ffn.as<float>(), ffn_stride, nullptr, T, exact}, add, thread);
        pool.barrier();
    }
    if (pass.logits) {
        const long count = pass.all ? T : 1;
        const Input last{x + (T - count) * D, D, &norm, count, exact || count == 1};
        multiply(head(), last, {Into::store, pass.logits, padded_vocab()}, thread);
    }
}

}  // namespace openelm
