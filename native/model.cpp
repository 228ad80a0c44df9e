#include "model.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace openelm {

namespace {

constexpr long CHUNK = 264;      // tokens of a prompt that go through the layers together: whole blocks of every size
constexpr long EXACT_TOKENS = 4;  // up to so many, memory is what takes time, and activations need not become bf16

long round_up(long n, long step) { return (n + step - 1) / step * step; }

uint16_t nearest_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void require(bool fine, const std::string& problem) {
    if (!fine) throw std::invalid_argument(problem);
}

}  // namespace

Sequence::Sequence(const Geometry& geometry, long capacity)
    : geometry(&geometry),
      capacity(capacity),
      padded(round_up(capacity, LANES)),
      head_words(padded * round_up(geometry.head_dim, LANES) / 2) {
    require(capacity > 0 && capacity < 1 << 24,
            "a capacity of " + std::to_string(capacity) + " positions: give 1 to 2^24");
    long heads = 0;
    for (int of_layer : geometry.kv_heads) first_head.push_back(heads), heads += of_layer;
    data = Buffer((size_t)2 * heads * head_words * 4);
}

void Sequence::truncate(long to) {
    require(0 <= to && to <= length, "cannot cut " + std::to_string(length) + " positions to " + std::to_string(to));
    length = to;
}

Model::Model(Geometry given, int threads, const std::string& kernels)
    : geometry(std::move(given)),
      k([&]() -> const Kernels& {
          const Kernels* found = find_kernels(kernels.c_str());
          require(found, "this CPU has no kernels '" + kernels + "'");
          return *found;
      }()),
      pool((require(threads > 0 && threads <= 1024, std::to_string(threads) + " threads: give 1 to 1024"), threads)) {
    const Geometry& g = geometry;
    const size_t n = g.query_heads.size();
    const auto sane = [](long width) { return width > 0 && width < 1 << 24; };
    bool fine = n > 0 && g.kv_heads.size() == n && g.ffn_dims.size() == n && sane(g.model_dim) && sane(g.vocab_size) &&
                sane(g.head_dim) && g.head_dim % 2 == 0 && g.rope.size() * 2 == (size_t)g.head_dim;
    for (size_t i = 0; fine && i < n; i++)
        fine = sane(g.ffn_dims[i]) && g.kv_heads[i] > 0 && g.query_heads[i] % g.kv_heads[i] == 0 &&
               sane((long)g.head_dim * g.query_heads[i] * 3);
    require(fine, "the geometry contradicts itself");
    const int D = g.model_dim, K = g.head_dim;
    layers.resize(n);
    widest = D;
    for (size_t i = 0; i < n; i++) {
        Layer& layer = layers[i];
        const int H = g.query_heads[i], G = g.kv_heads[i], F = g.ffn_dims[i];
        layer.query_heads = H, layer.kv_heads = G, layer.ffn_dim = F;
        layer.qkv = Matrix((long)(H + 2 * G) * K, D, 1), layer.out = Matrix(D, (long)H * K, 1);
        layer.proj_1 = Matrix(2L * F, D, 2), layer.proj_2 = Matrix(D, F, 1);
        const std::string name = "layers." + std::to_string(i) + ".";
        matrices[name + "attn.qkv_proj.weight"] = &layer.qkv, matrices[name + "attn.out_proj.weight"] = &layer.out;
        matrices[name + "ffn.proj_1.weight"] = &layer.proj_1, matrices[name + "ffn.proj_2.weight"] = &layer.proj_2;
        gains[name + "attn_norm.weight"] = {&layer.attn_norm, D};
        gains[name + "ffn_norm.weight"] = {&layer.ffn_norm, D};
        if (g.qk_norm) {
            gains[name + "attn.q_norm.weight"] = {&layer.q_norm, K};
            gains[name + "attn.k_norm.weight"] = {&layer.k_norm, K};
        }
        widest = std::max({widest, (long)H * K, (long)F});
    }
    widest = round_up(widest, 128);
    gains["norm.weight"] = {&norm, D};
    embedding = Matrix(g.vocab_size, D, 1), classifier = Matrix(g.vocab_size, D, 1);
    matrices["token_embeddings.weight"] = &embedding;
    if (!g.shared_embedding) matrices["classifier.weight"] = &classifier;
}

void Model::set_gain(const std::string& name, const float* values, long length) {
    const auto found = gains.find(name);
    require(found != gains.end(), "the model has no gain " + name);
    require(length == found->second.second, name + " has " + std::to_string(length) + " values");
    found->second.first->assign(values, values + length);
}

Matrix& Model::matrix(const std::string& name, long rows, long columns) {
    const auto found = matrices.find(name);
    require(found != matrices.end(), "the model has no matrix " + name);
    Matrix& m = *found->second;
    require(m.form == Form::none, name + " is there already");
    require(m.rows == rows && m.columns == columns,
            name + " is of " + std::to_string(rows) + " x " + std::to_string(columns));
    return m;
}

void Model::set_matrix(const std::string& name, const uint16_t* values, long rows, long columns, int bits, int group) {
    require(bits == 4 || bits == 8 || bits == 16, std::to_string(bits) + " bits: give 4, 8 or 16");
    require(group == 32 || group == 64 || group == 128, "groups of " + std::to_string(group) + ": give 32, 64 or 128");
    matrix(name, rows, columns).fill(values, bits, group, k, pool, arena);
}

void Model::set_matrix(const std::string& name, const uint32_t* words, const void* scales, const void* biases, long rows,
                       long words_a_row, long groups, Affine affine) {
    require(affine.bits == 4 || affine.bits == 8, std::to_string(affine.bits) + " bits: give 4 or 8");
    const int group = affine.group;
    require(group == 32 || group == 64 || group == 128, "groups of " + std::to_string(group) + ": give 32, 64 or 128");
    require(words_a_row == groups * group * affine.bits / 32, name + ": words and groups do not fit");
    matrix(name, rows, groups * group).fill(words, scales, biases, affine, pool, arena);
}

void Model::check_complete() const {
    for (const auto& [name, m] : matrices) require(m->form != Form::none, "the model lacks " + name);
    for (const auto& [name, gain] : gains) require(!gain.first->empty(), "the model lacks " + name);
}

size_t Model::bytes() const {
    size_t total = head().bytes();
    for (const Layer& l : layers) total += l.qkv.bytes() + l.out.bytes() + l.proj_1.bytes() + l.proj_2.bytes();
    return total;
}

// ---------------------------------------------------------------------------------------------------- products

bool Model::in_pairs(const Matrix& m, long tokens) const {
    return m.form == Form::bf16 && k.block_bf16 && tokens > EXACT_TOKENS;
}

int Model::most_tokens(const Matrix& m, long tokens) const {
    return in_pairs(m, tokens) ? k.block_bf16 : m.form == Form::bf16 ? k.block_f32 : k.block_codes;
}

// Tokens first, first + 1, … (as many as the block of `size` takes and there are) into `to`, normalised where there is
// a gain.
void Model::pack(const Matrix& m, const Input& x, long first, int size, const Packed& to, Scratch& own) const {
    float* row = own.row.as<float>();
    const bool pairs = in_pairs(m, x.tokens);
    const Place at = place(m, to, first, pairs);
    for (int t = 0; t < size && first + t < x.tokens; t++) {
        const float* from = x.values + (first + t) * x.stride;
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

// y = m x for all tokens of x; or y += m x; or y = silu(gate) * up where m holds the two.
void Model::multiply(const Matrix& m, const Input& x, Into into, float* y, long y_stride, int thread) {
    Scratch& own = scratch[thread];
    const bool pairs = in_pairs(m, x.tokens);
    const int most = most_tokens(m, x.tokens), threads = pool.threads;
    const bool alone = x.tokens == 1;  // then each thread packs it for itself, which is quicker than to wait
    const Packed& packed = alone ? own.packed : shared;
    if (alone) {
        pack(m, x, 0, 1, packed, own);
    } else {
        for (long first = thread * most; first < x.tokens; first += (long)threads * most)
            pack(m, x, first, block_size(x.tokens - first, most), packed, own);
        pool.barrier();
    }
    const long units = m.tiles / m.halves;
    float* out = own.tile.as<float>();
    float* second = out + LARGEST_BLOCK * LANES;
    for (long unit = units * thread / threads; unit < units * (thread + 1) / threads; unit++)
        for (long first = 0; first < x.tokens; first += most) {
            const int size = block_size(x.tokens - first, most);
            const Place at = place(m, packed, first, pairs);
            product(m, unit * m.halves, at, size, pairs, out);
            if (into == Into::swiglu) product(m, unit * 2 + 1, at, size, pairs, second);
            for (int t = 0; t < size && first + t < x.tokens; t++) {
                float* to = y + (first + t) * y_stride + unit * LANES;
                if (into == Into::store) std::memcpy(to, out + t * LANES, LANES * 4);
                else if (into == Into::swiglu) k.swiglu(out + t * LANES, second + t * LANES, LANES, to);
                else for (int i = 0; i < LANES; i++) to[i] += out[t * LANES + i];
            }
        }
}

// --------------------------------------------------------------------------------------------------- attention

// Queries and keys normalised and turned by their positions; keys and values put into the cache.
void Model::place_heads(const Pass& pass, int index, int thread) {
    const Layer& layer = layers[index];
    const Sequence& sequence = pass.sequence;
    const int H = layer.query_heads, G = layer.kv_heads, K = geometry.head_dim, half = K / 2;
    const float scale = 1 / std::sqrt((float)K);
    const long all = (H + 2 * G) * pass.tokens;
    for (long i = all * thread / pool.threads; i < all * (thread + 1) / pool.threads; i++) {
        const long t = i % pass.tokens, position = pass.past + t;
        const int head = (int)(i / pass.tokens);
        float* row = qkv.as<float>() + t * qkv_stride + (long)head * K;
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
            for (int d = 0; d < K; d++) row[d] *= scale;
        } else if (head < H + G) {
            uint32_t* word = sequence.keys(index, head - H) + position / LANES * half * LANES + position % LANES;
            for (int d = 0; d < K; d += 2)
                word[d / 2 * LANES] = nearest_bf16(row[d]) | (uint32_t)nearest_bf16(row[d + 1]) << 16;
        } else {
            for (int d = 0; d < K; d++) {
                const long word = (d / LANES * sequence.padded / 2 + position / 2) * LANES + d % LANES;
                uint16_t* pair = reinterpret_cast<uint16_t*>(sequence.values(index, head - H - G) + word);
                pair[position % 2] = nearest_bf16(row[d]);
                // What an earlier, longer text left there would be multiplied by 0, but may not be finite.
                if (t == pass.tokens - 1 && position % 2 == 0) pair[1] = 0;
            }
        }
    }
}

// A column is a query: head c % n of the n that share the keys, of token c / n.
void Model::attend(const Pass& pass, int index, int thread) {
    const Layer& layer = layers[index];
    const int G = layer.kv_heads, share = layer.query_heads / G, most = k.block_f32, threads = pool.threads;
    if (pass.tokens == 1) {
        const int H = layer.query_heads, end = H * (thread + 1) / threads;
        for (int head = H * thread / threads, count; head < end; head += count) {
            count = std::min({end - head, share - head % share, most});
            attend_block(pass, index, head / share, head % share, count, thread);
        }
        return;
    }
    const long columns = pass.tokens * share, blocks = (columns + most - 1) / most;
    for (long i = thread; i < blocks * G; i += threads) {  // later tokens cost more: dealt out in turn
        const long first = i / G * most;
        attend_block(pass, index, (int)(i % G), first, (int)std::min<long>(most, columns - first), thread);
    }
}

void Model::attend_block(const Pass& pass, int index, int group, long first, int count, int thread) {
    const Sequence& sequence = pass.sequence;
    Scratch& own = scratch[thread];
    const int K = geometry.head_dim, share = layers[index].query_heads / layers[index].kv_heads;
    const int size = block_size(count, k.block_f32);
    const long padded = sequence.padded, longest = pass.past + (first + count - 1) / share + 1;
    float *query = own.query.as<float>(), *scores = own.scores.as<float>(), *weights = own.weights.as<float>();
    for (int c = 0; c < count; c++) {
        const long t = (first + c) / share, head = group * share + (first + c) % share;
        const float* row = qkv.as<float>() + t * qkv_stride + head * K;
        for (int d = 0; d < K; d++) query[d * size + c] = row[d];
    }
    for (long tile = 0; tile * LANES < longest; tile++)
        k.f32(sequence.keys(index, group) + tile * K / 2 * LANES, query, K / 2, size, scores + tile * LANES, padded);
    const long pairs = (longest + 1) / 2;
    for (int c = 0; c < count; c++) {
        const long seen = pass.past + (first + c) / share + 1;
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
    const long T = pass.tokens, D = hidden_stride;
    float* x = hidden.as<float>();
    for (long t = thread; t < T; t += pool.threads) {
        float *row = scratch[thread].row.as<float>(), *turn = turns.as<float>() + t * K;
        embedding.read_row(pass.ids[t], row);
        std::memcpy(x + t * D, row, geometry.model_dim * 4);
        for (int d = 0; d < half; d++) {
            const float angle = (float)(pass.past + t) * geometry.rope[d];
            turn[d] = std::cos(angle), turn[d + half] = std::sin(angle);
        }
    }
    pool.barrier();
    for (int i = 0; i < (int)layers.size(); i++) {
        const Layer& layer = layers[i];
        multiply(layer.qkv, {x, D, &layer.attn_norm, T}, Into::store, qkv.as<float>(), qkv_stride, thread);
        pool.barrier();
        place_heads(pass, i, thread);
        pool.barrier();
        attend(pass, i, thread);
        pool.barrier();
        multiply(layer.out, {attended.as<float>(), attended_stride, nullptr, T}, Into::add, x, D, thread);
        pool.barrier();
        multiply(layer.proj_1, {x, D, &layer.ffn_norm, T}, Into::swiglu, ffn.as<float>(), ffn_stride, thread);
        pool.barrier();
        multiply(layer.proj_2, {ffn.as<float>(), ffn_stride, nullptr, T}, Into::add, x, D, thread);
        pool.barrier();
    }
    if (pass.logits) {
        const long count = pass.all ? T : 1;
        multiply(head(), {x + (T - count) * D, D, &norm, count}, Into::store, pass.logits, padded_vocab(), thread);
    }
}

void Model::make_room(long tokens, long capacity) {
    if (tokens > room) {
        room = tokens > 1 ? CHUNK : 1;
        long most_heads = 0, most_queries = 0, most_ffn = 0;
        for (const Layer& l : layers) {
            most_heads = std::max(most_heads, l.qkv.rows);
            most_queries = std::max(most_queries, l.out.columns);
            most_ffn = std::max(most_ffn, (long)l.ffn_dim);
        }
        hidden_stride = round_up(geometry.model_dim, LANES), qkv_stride = round_up(most_heads, LANES);
        attended_stride = round_up(most_queries, LANES), ffn_stride = round_up(most_ffn, LANES);
        hidden = Buffer(room * hidden_stride * 4), qkv = Buffer(room * qkv_stride * 4);
        attended = Buffer(room * attended_stride * 4), ffn = Buffer(room * ffn_stride * 4);
        turns = Buffer(room * geometry.head_dim * 4);
        shared = make_packed(room + LARGEST_BLOCK);
    }
    if (const long padded = round_up(capacity, LANES); padded > positions) {
        positions = padded;
        scratch.clear();
        for (int i = 0; i < pool.threads; i++) {
            const size_t block = LARGEST_BLOCK * sizeof(float);
            scratch.push_back({Buffer(widest * 4), Buffer(2 * block * LANES), Buffer(block * geometry.head_dim),
                               Buffer(block * padded), Buffer(block * padded), make_packed(1)});
        }
    }
}

Model::Packed Model::make_packed(long tokens) const {
    const size_t groups = widest / 32 + 1;
    return {Buffer(tokens * widest * 4), Buffer(tokens * groups * 4), Buffer(tokens * groups * 4)};
}

void Model::forward(Sequence& sequence, const int32_t* ids, long count, float* logits, bool all) {
    const std::lock_guard<std::mutex> one_at_a_time(busy);
    if (!complete) check_complete();
    complete = true;
    require(sequence.geometry == &geometry, "the sequence belongs to another model");
    require(count > 0, "there is no token to run");
    require(count <= sequence.capacity - sequence.length,
            std::to_string(count) + " tokens behind " + std::to_string(sequence.length) +
                " are more than the capacity of " + std::to_string(sequence.capacity));
    for (long i = 0; i < count; i++)
        require(0 <= ids[i] && ids[i] < geometry.vocab_size,
                "token id " + std::to_string(ids[i]) + " is outside the vocabulary of " +
                    std::to_string(geometry.vocab_size));
    make_room(std::min(count, CHUNK), sequence.capacity);
    for (long done = 0; done < count; done += CHUNK) {
        const long tokens = std::min(CHUNK, count - done);
        float* here = all ? logits + done * padded_vocab() : done + tokens == count ? logits : nullptr;
        const Pass pass{sequence, ids + done, tokens, sequence.length, here, all};
        pool.run([&](int thread) { run(pass, thread); });
        sequence.length += tokens;
    }
}

}  // namespace openelm
