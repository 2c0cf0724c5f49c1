// Exact attention.
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "binding.h"

namespace longreach {
namespace {

using Entry = std::tuple<FloatsIn, int64_t, int64_t, int64_t, FloatsOut, FloatsOut>;

using Pair = std::tuple<AnyArray, AnyArray, std::string, std::vector<Entry>>;

void attend(const std::vector<Pair>& pairs, float scale, float softcap) {
  const LogitRule rule = logit_rule(scale, softcap);
  std::vector<KvRows> batch;
  batch.reserve(pairs.size());
  for (const auto& [keys, values, storage, entries] : pairs) {
    KvRows& pair = batch.emplace_back(KvRows{layer_view(keys, values, storage), {}});
    pair.entries.reserve(entries.size());
    for (const auto& [queries, head, start, stop, output, lse] : entries)
      pair.entries.push_back(rows_view(pair.kv, queries, head, start, stop, output, lse));
  }
  nb::gil_scoped_release unlocked;
  attend_exact(batch, rule);
}

}  // namespace

void bind_exact(nb::module_& module) {
  module.def("attend_exact", &attend, nb::arg("pairs"), nb::arg("scale"), nb::arg("softcap"),
             "Exact partial attention. Pairs are (keys, values, storage, entries) and entries "
             "(queries [rows, heads, group, head_dim], kv_head_start, start, stop, output, lse); "
             "output and lse are filled in.");
}

}  // namespace longreach
