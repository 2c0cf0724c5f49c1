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
// (queries, kv_head_start, start, stop, output, lse, budget, logit_floor or None).
using BudgetedEntry = std::tuple<FloatsIn, int64_t, int64_t, int64_t, FloatsOut, FloatsOut,
                                 BudgetTuple, std::optional<FloatsIn>>;

// Views of a batch, with its figures and, when they are wanted, the lists of selected keys.
class BudgetedBatch {
 public:
  BudgetedBatch(const LayerKv& kv, const std::vector<BudgetedEntry>& entries, bool want_selected);

  const std::vector<BudgetedRows>& entries() const { return entries_; }

  // (figures, selected). figures: per entry the sums of HeadFigures' members in their order.
  // selected: per entry a list of int32 arrays, one for each (row, head, query head); empty if not
  // wanted.
  nb::tuple results() const;

 private:
  nb::list figures() const;
  nb::list selected() const;

  std::vector<BudgetedRows> entries_;
  std::vector<std::vector<HeadFigures>> figures_;
  std::vector<std::vector<std::vector<int32_t>>> selected_;
};

}  // namespace longreach
