// OpenELM on a CPU: weights in tiles, a cache for each sequence, and the pass through all layers.
#pragma once
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "matrix.h"

namespace openelm {

struct Geometry {
    int model_dim, head_dim, vocab_size;
    std::vector<int> query_heads, kv_heads, ffn_dims;  // one a layer
    bool qk_norm, shared_embedding;
    std::vector<float> rope;  // head_dim / 2 angles from one position to the next
};

// Keys and values in bf16, in tiles like the weights', so that attention is two of the same products:
// scores = keys (16 positions a tile) times query, result = values (16 dimensions a tile) times probabilities.
class Sequence {
  public:
    Sequence(const Geometry& geometry, long capacity);
    Sequence(const Sequence&) = delete;
    uint32_t* keys(int layer, int head) const {
        return data.as<uint32_t>() + 2 * (first_head[layer] + head) * head_words;
    }
    uint32_t* values(int layer, int head) const { return keys(layer, head) + head_words; }
    void truncate(long length);
    void copy(const Sequence& source);  // what it holds, in place of what this one held

    const Geometry* const geometry;    // whose it is
    const long capacity, padded;       // positions, and whole tiles of them
    const long head_words;             // of a head's keys, and of its values
    long length = 0;

  private:
    std::vector<long> first_head;  // of each layer, among those of all
    Buffer data;
};

struct Run {  // tokens that are to follow what a sequence holds
    Sequence* sequence;
    const int64_t* ids;
    long count;
};

class Model {
  public:
    // `kernels` by name, or "" for the fastest. Raises std::invalid_argument, as all of these do for what does not fit.
    Model(Geometry geometry, int threads, const std::string& kernels);
    Model(const Model&) = delete;

    // Tensors by their names inside the package.
    void set_gain(const std::string& name, const float* values, long length);
    void set_matrix(const std::string& name, const uint16_t* values, long rows, long columns, int bits, int group);
    void set_matrix(const std::string& name, const uint32_t* words, const void* scales, const void* biases, long rows,
                    long words_a_row, long groups, Affine affine);

    // Each sequence's tokens by themselves; logits of the last of each, or of all, padded_vocab() apart.
    void forward(const std::vector<Run>& runs, float* logits, bool all);
    // One token of each sequence, all at once; no bit depends on how many they are.
    void decode(const std::vector<Run>& runs, float* logits);

    long padded_vocab() const { return (geometry.vocab_size + LANES - 1) / LANES * LANES; }
    size_t bytes() const;  // of weights that a token reads: all but an embedding that is a look-up only
    const Geometry geometry;

  private:
    struct Layer {
        int query_heads, kv_heads, ffn_dim;
        std::vector<float> attn_norm, q_norm, k_norm, ffn_norm;
        Matrix qkv, out, proj_1, proj_2;
    };
    struct Input {  // of a product
        const float* values;
        long stride;
        const std::vector<float>* gain;  // of the norm that goes before, if one does
        long tokens;
        bool exact;  // whether activations must stay in fp32 where weights are bf16
    };
    enum class Into { store, add, swiglu };
    struct Output {
        Into into;
        float* values;
        long stride;
    };
    struct Packed {  // an input as the kernels read it
        Buffer words, scale, sum;
    };
    struct Place {  // a block of it
        uint32_t* words;
        float *scale, *sum;
    };
    struct Scratch {  // of one thread
        Buffer row, tile, query, scores, weights;
        Packed packed;
    };
    struct Token {
        Sequence* sequence;
        int64_t id;
        long position;
    };
    struct Pass {  // one run through the layers
        const std::vector<Token>& tokens;
        bool apart;     // each is of a sequence of its own; else all follow each other in one
        float* logits;  // of all tokens, or of the last; null where none are wanted
        bool all;
    };

    Matrix& matrix(const std::string& name, long rows, long columns);
    const Matrix& head() const { return geometry.shared_embedding ? embedding : classifier; }
    void check_complete() const;
    void check(const std::vector<Run>& runs);
    void run(const Pass& pass);
    void make_room(long tokens, long capacity);
    Packed make_packed(long tokens) const;
    bool in_pairs(const Matrix& m, const Input& x) const;  // whether activations become bf16
    int most_tokens(const Matrix& m, const Input& x) const;
    Place place(const Matrix& m, const Packed& packed, long first, bool pairs) const;
    void pack(const Matrix& m, const Input& x, long token, const Packed& to, Scratch& own) const;
    void product(const Matrix& m, long tile, const Place& x, int size, bool pairs, float* y) const;
    // What follows is called on all threads at once.
    const Packed& packed(const Matrix& m, const Input& x, int thread);
    void multiply(const Matrix& m, long tile, const Input& x, const Packed& packed, const Output& y, int thread);
    void multiply(const Matrix& m, const Input& x, const Output& y, int thread);
    void project_heads(const Pass& pass, int layer, const Input& x, int thread);
    void place_head(const Pass& pass, int layer, int head, long token);
    void attend(const Pass& pass, int layer, int thread);
    void attend_block(const Pass& pass, int layer, int group, long first, int count, int thread);
    void run(const Pass& pass, int thread);

  public:
    const Kernels& k;
    Pool pool;

  private:
    std::mutex busy;
    Arena arena;
    bool complete = false;
    std::vector<Layer> layers;
    Matrix embedding, classifier;
    std::vector<float> norm;
    std::map<std::string, Matrix*> matrices;
    std::map<std::string, std::pair<std::vector<float>*, long>> gains;

    long room = 0, positions = 0, widest = 0;  // tokens and positions that there is room for; columns of any matrix
    long hidden_stride = 0, qkv_stride = 0, head_stride = 0, attended_stride = 0, ffn_stride = 0;
    Buffer hidden, qkv, attended, ffn;  // [token][stride]
    Buffer turns;                       // [token][cosines, then sines]
    Packed shared;
    std::vector<Scratch> scratch;
};

}  // namespace openelm
