// Exact attention.
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "binding.h"

namespace longreach {
namespace {

using Entry = std::tuple<FloatsIn, int64_t, int64_t, int64_t, FloatsOut, FloatsOut>;

void attend(const AnyArray& keys, const AnyArray& values, const std::string& storage,
            const std::vector<Entry>& entries, float scale, float softcap) {
  const LayerKv kv = layer_view(keys, values, storage);
  const LogitRule rule = logit_rule(scale, softcap);
  std::vector<AttentionRows> batch;
  batch.reserve(entries.size());
  for (const auto& [queries, head, start, stop, output, lse] : entries)
    batch.push_back(rows_view(kv, queries, head, start, stop, output, lse));
  nb::gil_scoped_release unlocked;
  attend_exact(kv, batch, rule);
}

}  // namespace

void bind_exact(nb::module_& module) {
  module.def("attend_exact", &attend, nb::arg("keys"), nb::arg("values"), nb::arg("storage"),
             nb::arg("entries"), nb::arg("scale"), nb::arg("softcap"),
             "Exact partial attention. Entries are (queries [rows, heads, group, head_dim], "
             "kv_head_start, start, stop, output, lse); output and lse are filled in.");
}

}  // namespace longreach
