// Budgeted attention over a whole scope or over given candidates.
#include "bind_budgeted.h"

namespace longreach {
namespace {

nb::tuple attend_scope(const AnyArray& keys, const AnyArray& values, const std::string& storage,
                      const std::vector<BudgetedEntry>& entries, float scale, float softcap,
                      bool want_selected) {
  const LayerKv kv = layer_view(keys, values, storage);
  const LogitRule rule = logit_rule(scale, softcap);
  BudgetedBatch batch(kv, entries, want_selected);
  {
    nb::gil_scoped_release unlocked;
    attend_best(kv, batch.entries(), rule);
  }
  return batch.results();
}

using Offsets = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Checks that the ids of each (row, head) ascend within the scope.
Candidates candidates_view(const AttentionRows& rows, const Offsets& offsets, const Ids& ids) {
  const int64_t lists = rows.rows * rows.heads;
  require(static_cast<int64_t>(offsets.size()) == lists + 1,
          "offsets need rows * heads + 1 = " + std::to_string(lists + 1) + " entries");
  const int64_t* at = offsets.data();
  require(at[0] == 0 && at[lists] == static_cast<int64_t>(ids.size()),
          "offsets must go from 0 to the number of ids");
  for (int64_t i = 0; i < lists; ++i) require(at[i] <= at[i + 1], "offsets must not descend");
  for (int64_t i = 0; i < lists; ++i) {
    int64_t previous = rows.start - 1;
    for (int64_t j = at[i]; j < at[i + 1]; ++j) {
      const int64_t id = ids.data()[j];
      require(id > previous && id < rows.stop, "ids must ascend and lie within the scope");
      previous = id;
    }
  }
  return {at, ids.data()};
}

nb::tuple attend_given(const AnyArray& keys, const AnyArray& values, const std::string& storage,
                      const std::vector<BudgetedEntry>& entries,
                      const std::vector<std::tuple<Offsets, Ids>>& candidates, float scale,
                      float softcap, bool want_selected) {
  const LayerKv kv = layer_view(keys, values, storage);
  const LogitRule rule = logit_rule(scale, softcap);
  BudgetedBatch batch(kv, entries, want_selected);
  require(candidates.size() == entries.size(), "one set of candidates per entry is needed");
  std::vector<Candidates> views;
  for (size_t i = 0; i < entries.size(); ++i)
    views.push_back(candidates_view(batch.entries()[i].rows, std::get<0>(candidates[i]),
                                    std::get<1>(candidates[i])));
  {
    nb::gil_scoped_release unlocked;
    attend_candidates(kv, batch.entries(), views, rule);
  }
  return batch.results();
}

}  // namespace

void bind_chosen(nb::module_& module) {
  module.def("attend_scope", &attend_scope, nb::arg("keys"), nb::arg("values"), nb::arg("storage"),
             nb::arg("entries"), nb::arg("scale"), nb::arg("softcap"), nb::arg("want_selected"),
             "Each entry's budget over every key of its scope.");
  module.def("attend_candidates", &attend_given, nb::arg("keys"), nb::arg("values"),
             nb::arg("storage"), nb::arg("entries"), nb::arg("candidates"), nb::arg("scale"),
             nb::arg("softcap"), nb::arg("want_selected"),
             "Each entry's budget over candidates (offsets [rows * heads + 1], ascending ids).");
}

}  // namespace longreach
