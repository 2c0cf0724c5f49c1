// Budgeted entries as they come from Python, and what goes back.
#pragma once

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <tuple>
#include <vector>

#include "binding.h"
#include "chosen.h"

namespace longreach {

// (rule, top_k, mass, floor, ceiling, beta, tail_estimate), rule as in BudgetRule.
using BudgetTuple = std::tuple<int, int64_t, double, int64_t, int64_t, float, bool>;
using FiguresOut = nb::ndarray<int64_t, nb::c_contig, nb::device::cpu>;
// (queries, kv_head_start, start, stop, output, lse, budget, logit_floor or None, figures).
using BudgetedEntry = std::tuple<FloatsIn, int64_t, int64_t, int64_t, FloatsOut, FloatsOut,
                                 BudgetTuple, std::optional<FloatsIn>, FiguresOut>;

// Views of a batch, with the lists of selected keys when they are wanted.
class BudgetedBatch {
 public:
  BudgetedBatch(const LayerKv& kv, const std::vector<BudgetedEntry>& entries, bool want_selected);

  const std::vector<BudgetedRows>& entries() const { return entries_; }

  // Per entry a list of int32 arrays, one for each (row, head, query head); empty if not wanted.
  nb::list selected() const;

 private:
  std::vector<BudgetedRows> entries_;
  std::vector<std::vector<std::vector<int32_t>>> selected_;
};

}  // namespace longreach
