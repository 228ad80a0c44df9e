// What Python sees; openelm/infer/native.py is its only reader. std::invalid_argument arrives there as ValueError.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>

#include "model.h"

namespace nb = nanobind;
using namespace openelm;

namespace {

template <class T, int N>
using Array = nb::ndarray<const T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using Ids = Array<int64_t, 1>;
using Logits = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

using Scales = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;  // bf16 or fp32

void set_affine(Model& model, const std::string& name, Array<uint32_t, 2> words, Scales scales, Scales biases, int bits,
                int group) {
    const bool wide = scales.dtype() == nb::dtype<float>();
    const bool fine = (wide || scales.dtype() == nb::dtype<uint16_t>()) && biases.dtype() == scales.dtype() &&
                      scales.shape(0) == words.shape(0) && biases.shape(0) == words.shape(0) &&
                      scales.shape(1) == biases.shape(1);
    if (!fine) throw std::invalid_argument(name + ": words, scales and biases do not fit");
    nb::gil_scoped_release release;
    model.set_matrix(name, words.data(), scales.data(), biases.data(), (long)words.shape(0), (long)words.shape(1),
                     (long)scales.shape(1), {bits, group, wide});
}

// The ids of all sequences stand behind each other, counts[i] of them of the i-th.
std::vector<Run> runs(const std::vector<Sequence*>& sequences, const Ids& ids, const std::vector<long>& counts) {
    std::vector<Run> all;
    long first = 0, end = (long)ids.shape(0);
    bool fine = sequences.size() == counts.size();
    for (size_t i = 0; fine && i < counts.size(); first += counts[i++]) {
        fine = sequences[i] && 0 <= counts[i] && counts[i] <= end - first;
        all.push_back({sequences[i], ids.data() + first, counts[i]});
    }
    if (!fine || first != end) throw std::invalid_argument("sequences, ids and counts do not fit");
    return all;
}

void forward(Model& model, const std::vector<Sequence*>& sequences, Ids ids, const std::vector<long>& counts,
             Logits logits, bool all) {
    if (logits.shape(0) != (all ? ids.shape(0) : sequences.size()) || (long)logits.shape(1) != model.padded_vocab())
        throw std::invalid_argument("logits must be (tokens, or sequences; padded vocabulary)");
    const auto given = runs(sequences, ids, counts);
    nb::gil_scoped_release release;
    model.forward(given, logits.data(), all);
}

void decode(Model& model, const std::vector<Sequence*>& sequences, Ids ids, Logits logits) {
    if (logits.shape(0) != sequences.size() || (long)logits.shape(1) != model.padded_vocab())
        throw std::invalid_argument("logits must be (sequences, padded vocabulary)");
    const auto given = runs(sequences, ids, std::vector<long>(sequences.size(), 1));
    nb::gil_scoped_release release;
    model.decode(given, logits.data());
}

double read_bandwidth(int threads, size_t bytes, int rounds) {
    if (threads < 1 || threads > 1024 || bytes < 4096 || rounds < 1)
        throw std::invalid_argument("give 1 to 1024 threads, at least 4096 bytes and a round");
    nb::gil_scoped_release release;
    using clock = std::chrono::steady_clock;
    const Kernels& k = *find_kernels("");
    Pool pool(threads);
    const long words = (long)(bytes / 256 / threads) * 32;  // of each thread
    const Buffer buffer(words * threads * 8);
    std::vector<uint64_t> sums(threads * 8);
    double best = 0;
    pool.run([&](int thread) { std::fill_n(buffer.as<uint64_t>() + words * thread, words, 1); });
    for (int round = 0; round < rounds; round++) {
        const auto start = clock::now();
        pool.run([&](int thread) { sums[thread * 8] = k.sum(buffer.as<uint64_t>() + words * thread, words); });
        const double elapsed_s = std::chrono::duration<double>(clock::now() - start).count();
        for (int t = 0; t < threads; t++)
            if (sums[t * 8] != (uint64_t)words) throw std::runtime_error("memory was not read");
        best = std::max(best, (double)words * threads * 8 / elapsed_s);
    }
    return best;
}

}  // namespace

NB_MODULE(_native, m) {
    nb::class_<Sequence>(m, "Sequence")
        .def_ro("length", &Sequence::length)
        .def_ro("capacity", &Sequence::capacity)
        .def("truncate", &Sequence::truncate)
        .def("copy", &Sequence::copy, nb::call_guard<nb::gil_scoped_release>());
    nb::class_<Model>(m, "Model")
        .def("__init__",
             [](Model* self, int model_dim, int head_dim, int vocab_size, std::vector<int> query_heads,
                std::vector<int> kv_heads, std::vector<int> ffn_dims, bool qk_norm, bool shared_embedding,
                std::vector<float> rope, int threads, const std::string& kernels) {
                 new (self) Model({model_dim, head_dim, vocab_size, std::move(query_heads), std::move(kv_heads),
                                   std::move(ffn_dims), qk_norm, shared_embedding, std::move(rope)},
                                  threads, kernels);
             },
             nb::kw_only(), nb::arg("model_dim"), nb::arg("head_dim"), nb::arg("vocab_size"), nb::arg("query_heads"),
             nb::arg("kv_heads"), nb::arg("ffn_dims"), nb::arg("qk_norm"), nb::arg("shared_embedding"), nb::arg("rope"),
             nb::arg("threads"), nb::arg("kernels"))
        .def("set_gain", [](Model& model, const std::string& name, Array<float, 1> values) {
            model.set_gain(name, values.data(), (long)values.shape(0));
        }, nb::arg(), nb::arg().noconvert())
        .def("set_bf16", [](Model& model, const std::string& name, Array<uint16_t, 2> values, int bits, int group) {
            nb::gil_scoped_release release;
            model.set_matrix(name, values.data(), (long)values.shape(0), (long)values.shape(1), bits, group);
        }, nb::arg(), nb::arg().noconvert(), nb::arg(), nb::arg())
        .def("set_affine", set_affine, nb::arg(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(),
             nb::arg(), nb::arg())
        .def("new_sequence", [](const Model& model, long capacity) { return new Sequence(model.geometry, capacity); },
             nb::keep_alive<0, 1>())
        .def("forward", forward, nb::arg(), nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(), nb::arg())
        .def("decode", decode, nb::arg(), nb::arg().noconvert(), nb::arg().noconvert())
        .def_prop_ro("padded_vocab", &Model::padded_vocab)
        .def_prop_ro("bytes", &Model::bytes)
        .def_prop_ro("threads", [](const Model& model) { return model.pool.threads; })
        .def_prop_ro("kernels", [](const Model& model) { return model.k.name; });
    m.def("read_bandwidth", read_bandwidth, nb::arg("threads"), nb::arg("bytes"), nb::arg("rounds"));
    m.def("has_kernels", [](const std::string& name) { return !name.empty() && find_kernels(name.c_str()); });
}
