// Building graphs over keys, and attention over what they find.
#include <nanobind/stl/function.h>

#include <memory>

#include "bind_budgeted.h"
#include "graph.h"
#include "graph_build.h"

namespace longreach {
namespace {

using Longs = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::c_contig, nb::device::cpu>;

// The graphs of the KV heads of a layer, checked once so that no search can leave the arrays.
class LayerGraphs {
 public:
  LayerGraphs(const std::vector<std::tuple<Longs, Ints, int64_t>>& heads, int64_t count)
      : heads_(heads), count_(count) {
    for (const auto& [offsets, edges, entry] : heads_) {
      check(offsets, edges, entry);
      views_.push_back({offsets.data(), edges.data(), static_cast<int32_t>(entry)});
    }
  }

  const std::vector<KeyGraph>& views() const { return views_; }
  int64_t count() const { return count_; }

 private:
  void check(const Longs& offsets, const Ints& edges, int64_t entry) const {
    require(static_cast<int64_t>(offsets.size()) == count_ + 1,
            "graph offsets need " + std::to_string(count_ + 1) + " entries, one more than there are keys");
    const int64_t* at = offsets.data();
    require(at[0] == 0 && at[count_] == static_cast<int64_t>(edges.size()),
            "graph offsets must go from 0 to the number of edges");
    bool ascending = true;
    for (int64_t v = 0; v < count_; ++v) ascending = ascending && at[v] <= at[v + 1];
    require(ascending, "graph offsets must not descend");
    bool inside = true;
    for (size_t e = 0; e < edges.size(); ++e)
      inside = inside && edges.data()[e] >= 0 && edges.data()[e] < count_;
    require(inside, "graph edges must name keys from 0 to " + std::to_string(count_ - 1));
    require(count_ == 0 || (entry >= 0 && entry < count_), "the graph's entry is not one of its keys");
  }

  std::vector<std::tuple<Longs, Ints, int64_t>> heads_;  // keep the arrays alive
  int64_t count_;
  std::vector<KeyGraph> views_;
};

nb::tuple attend(const AnyArray& keys, const AnyArray& values, const std::string& storage,
                const AnyArray& sample_keys, const AnyArray& sample_values,
                const LayerGraphs& graphs, const std::vector<BudgetedEntry>& entries, float scale,
                float softcap, const std::tuple<int64_t, double, int64_t>& width, bool want_selected) {
  const LayerKv kv = layer_view(keys, values, storage);
  const LayerKv sample = layer_view(sample_keys, sample_values, storage);
  const LogitRule rule = logit_rule(scale, softcap);
  const auto [beam, oversearch, stride] = width;
  require(beam >= 1 && oversearch >= 1 && stride >= 1, "beam, oversearch and stride must be 1 or more");
  require(static_cast<int64_t>(graphs.views().size()) == kv.kv_heads && graphs.count() == kv.count,
          "the graphs belong to other keys");
  require(sample.kv_heads == kv.kv_heads && sample.keys.dim == kv.keys.dim &&
              sample.values.dim == kv.values.dim && sample.count == (kv.count + stride - 1) / stride,
          "the sample must hold every stride-th key of every head");
  BudgetedBatch batch(kv, entries, want_selected);
  {
    nb::gil_scoped_release unlocked;
    attend_graph(kv, sample, graphs.views(), batch.entries(), rule, {beam, oversearch, stride});
  }
  return batch.results();
}

template <class T>
nb::object owned(std::vector<T>&& items) {
  auto* kept = new std::vector<T>(std::move(items));
  nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, T, nb::ndim<1>>(kept->data(), {kept->size()}, owner));
}

nb::tuple build(const AnyArray& keys, const Ints& neighbours, int64_t pivots, int64_t degree,
                int64_t build_beam, int threads, const nb::callable& proceed) {
  require(keys.ndim() == 2 && keys.dtype() == nb::dtype<uint16_t>(),
          "keys must be [n, head_dim] bfloat16");
  require(keys.shape(1) >= 1 && keys.stride(1) == 1, "keys need dense rows");
  const int64_t count = static_cast<int64_t>(keys.shape(0));
  require(count < INT32_MAX, "more than 2^31 - 2 keys in one graph");
  require(neighbours.ndim() == 2, "neighbours must be [queries, width]");
  for (size_t i = 0; i < neighbours.size(); ++i)
    require(neighbours.data()[i] < count, "neighbours name keys that are not there");
  require(pivots >= 1 && degree >= 1 && build_beam >= 1 && threads >= 1,
          "pivots, degree, beam and threads must be 1 or more");
  const Rows rows{keys.data(), Storage::kBfloat16, static_cast<int>(keys.shape(1)), keys.stride(0)};
  const QueryNeighbours lists{neighbours.data(), static_cast<int64_t>(neighbours.shape(0)),
                              static_cast<int64_t>(neighbours.shape(1))};
  BuiltGraph graph;
  {
    nb::gil_scoped_release unlocked;
    try {
      graph = build_graph(rows, count, lists, {pivots, degree, build_beam}, threads, [&] {
        nb::gil_scoped_acquire locked;
        return nb::cast<bool>(proceed());
      });
    } catch (const BuildStopped&) {
      nb::gil_scoped_acquire locked;
      return nb::make_tuple();
    }
  }
  return nb::make_tuple(owned(std::move(graph.offsets)), owned(std::move(graph.edges)), graph.entry);
}

}  // namespace

void bind_graph(nb::module_& module) {
  nb::class_<LayerGraphs>(module, "LayerGraphs", "Graphs of the KV heads of a layer, checked.")
      .def(nb::init<const std::vector<std::tuple<Longs, Ints, int64_t>>&, int64_t>(), nb::arg("heads"),
           nb::arg("count"));
  module.def("attend_graph", &attend, nb::arg("keys"), nb::arg("values"), nb::arg("storage"),
             nb::arg("sample_keys"), nb::arg("sample_values"), nb::arg("graphs"), nb::arg("entries"),
             nb::arg("scale"), nb::arg("softcap"), nb::arg("width"), nb::arg("want_selected"),
             "Each entry's budget over the keys that a graph search finds; width is (beam, "
             "oversearch, sample stride).");
  module.def("build_graph", &build, nb::arg("keys"), nb::arg("neighbours"), nb::arg("pivots"),
             nb::arg("degree"), nb::arg("build_beam"), nb::arg("threads"), nb::arg("proceed"),
             "Graph over centred bfloat16 keys: (offsets, edges, entry), or () when stopped.");
}

}  // namespace longreach
