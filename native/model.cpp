#include "model.h"

#include <algorithm>
#include <cstring>

namespace openelm {

namespace {

constexpr long CHUNK = 264;  // tokens that go through the layers together: whole blocks of every size

long round_up(long n, long step) { return (n + step - 1) / step * step; }

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

void Sequence::copy(const Sequence& source) {
    require(source.geometry == geometry && source.padded == padded, "only sequences of one kind can be copied");
    if (&source == this) return;
    const long key_words = round_up(source.length, LANES) * geometry->head_dim / 2;
    const long value_words = round_up(source.length, 2) / 2 * LANES, tile_words = padded / 2 * LANES;
    for (int layer = 0; layer < (int)geometry->kv_heads.size(); layer++)
        for (int head = 0; head < geometry->kv_heads[layer]; head++) {
            std::memcpy(keys(layer, head), source.keys(layer, head), key_words * 4);
            for (long tile = 0; tile * tile_words < head_words; tile++)
                std::memcpy(values(layer, head) + tile * tile_words, source.values(layer, head) + tile * tile_words,
                            value_words * 4);
        }
    length = source.length;
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
        layer.qkv = Matrix((long)(H + 2 * G) * K, D, H + 2 * G), layer.out = Matrix(D, (long)H * K);
        layer.proj_1 = Matrix(2L * F, D, 2, true), layer.proj_2 = Matrix(D, F);
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
    embedding = Matrix(g.vocab_size, D), classifier = Matrix(g.vocab_size, D);
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

void Model::set_matrix(const std::string& name, const uint32_t* words, const void* scales, const void* biases,
                       long rows, long words_a_row, long groups, Affine affine) {
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

void Model::make_room(long tokens, long capacity) {
    if (tokens > room) {
        room = tokens > 1 ? CHUNK : 1;
        long most_heads = 0, most_queries = 0, most_ffn = 0;
        for (const Layer& l : layers) {
            most_heads = std::max(most_heads, l.qkv.tiles * LANES);
            most_queries = std::max(most_queries, l.out.columns);
            most_ffn = std::max(most_ffn, (long)l.ffn_dim);
        }
        hidden_stride = round_up(geometry.model_dim, LANES), qkv_stride = most_heads;
        head_stride = round_up(geometry.head_dim, LANES);
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

void Model::check(const std::vector<Run>& runs) {
    if (!complete) check_complete();
    complete = true;
    for (size_t i = 0; i < runs.size(); i++) {
        const auto [sequence, ids, count] = runs[i];
        require(sequence->geometry == &geometry, "the sequence belongs to another model");
        for (size_t k = 0; k < i; k++) require(runs[k].sequence != sequence, "a sequence is there twice");
        require(count > 0, "there is no token to run");
        require(count <= sequence->capacity - sequence->length,
                std::to_string(count) + " tokens behind " + std::to_string(sequence->length) +
                    " are more than the capacity of " + std::to_string(sequence->capacity));
        for (long t = 0; t < count; t++)
            require(0 <= ids[t] && ids[t] < geometry.vocab_size,
                    "token id " + std::to_string(ids[t]) + " is outside the vocabulary of " +
                        std::to_string(geometry.vocab_size));
    }
}

void Model::run(const Pass& pass) {
    long most = 0;
    for (const Token& token : pass.tokens) most = std::max(most, token.sequence->capacity);
    make_room((long)pass.tokens.size(), most);
    pool.run([&](int thread) { run(pass, thread); });
    for (const Token& token : pass.tokens) token.sequence->length = token.position + 1;
}

void Model::forward(const std::vector<Run>& runs, float* logits, bool all) {
    const std::lock_guard<std::mutex> one_at_a_time(busy);
    check(runs);
    std::vector<Token> tokens;
    for (const auto& [sequence, ids, count] : runs) {
        for (long done = 0; done < count; done += (long)tokens.size()) {
            tokens.clear();
            for (long t = done; t < std::min(done + CHUNK, count); t++)
                tokens.push_back({sequence, ids[t], sequence->length + t - done});
            const bool last = done + (long)tokens.size() == count;
            run({tokens, false, all || last ? logits : nullptr, all});
            if (all || last) logits += (all ? tokens.size() : 1) * padded_vocab();
        }
    }
}

void Model::decode(const std::vector<Run>& runs, float* logits) {
    const std::lock_guard<std::mutex> one_at_a_time(busy);
    check(runs);
    std::vector<Token> tokens;
    for (size_t done = 0; done < runs.size(); done += tokens.size()) {
        tokens.clear();
        for (size_t i = done; i < std::min(done + CHUNK, runs.size()); i++)
            tokens.push_back({runs[i].sequence, runs[i].ids[0], runs[i].sequence->length});
        run({tokens, true, logits + done * padded_vocab(), true});
    }
}

}  // namespace openelm
