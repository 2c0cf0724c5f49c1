#include "bind_budgeted.h"

#include <cmath>
#include <memory>

namespace longreach {
namespace {

Budget budget_of(const BudgetTuple& tuple) {
  const auto [rule, top_k, mass, floor, ceiling, beta, tail_estimate] = tuple;
  require(rule >= 0 && rule <= 3, "unknown budget rule " + std::to_string(rule));
  const Budget budget{
      static_cast<BudgetRule>(rule), top_k, mass, floor, ceiling, beta, tail_estimate};
  if (budget.rule == BudgetRule::kTopK)
    require(top_k >= 1, "top_k is " + std::to_string(top_k) + "; it must be at least 1");
  if (budget.rule == BudgetRule::kMass)
    require(mass > 0 && mass <= 1, "mass is " + std::to_string(mass) + "; it must be in (0, 1]");
  if (budget.rule == BudgetRule::kBeta)
    require(std::isfinite(beta) && beta >= 0,
            "beta is " + std::to_string(beta) + "; it must be 0 or more");
  require(floor >= 0 && ceiling >= 0, "floor and ceiling must be 0 or more");
  return budget;
}

// A NumPy array that owns a copy of the list.
nb::object owned(const std::vector<int32_t>& list) {
  auto copy = std::make_unique<int32_t[]>(list.size() + 1);
  std::copy(list.begin(), list.end(), copy.get());
  int32_t* data = copy.release();
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<int32_t*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, int32_t, nb::ndim<1>>(data, {list.size()}, owner));
}

}  // namespace

BudgetedBatch::BudgetedBatch(const LayerKv& kv, const std::vector<BudgetedEntry>& entries,
                             bool want_selected) {
  selected_.resize(want_selected ? entries.size() : 0);
  figures_.resize(entries.size());
  for (size_t i = 0; i < entries.size(); ++i) {
    const auto& [queries, head, start, stop, output, lse, budget, floor] = entries[i];
    const AttentionRows rows = rows_view(kv, queries, head, start, stop, output, lse);
    const size_t pairs = static_cast<size_t>(rows.rows) * rows.heads;
    figures_[i].resize(pairs);
    if (floor) {
      require(floor->ndim() == 3 && floor->shape(0) == rows.rows && floor->shape(1) == rows.heads &&
                  floor->shape(2) == rows.group,
              "logit_floor must be [rows, heads, group]");
      for (size_t j = 0; j < floor->size(); ++j)
        require(!std::isnan(floor->data()[j]), "logit_floor holds NaN");
    }
    if (want_selected) selected_[i].resize(pairs * rows.group);
    entries_.push_back({rows, budget_of(budget), floor ? floor->data() : nullptr,
                        figures_[i].data(), want_selected ? &selected_[i] : nullptr});
  }
}

nb::tuple BudgetedBatch::results() const { return nb::make_tuple(figures(), selected()); }

nb::list BudgetedBatch::figures() const {
  nb::list entries;
  for (const auto& heads : figures_) {
    HeadFigures sum{};
    for (const HeadFigures& head : heads) {
      sum.scanned += head.scanned;
      sum.sketched += head.sketched;
      sum.attended += head.attended;
      sum.tail_rows += head.tail_rows;
      sum.code_bytes += head.code_bytes;
      sum.search_ns += head.search_ns;
      sum.attend_ns += head.attend_ns;
    }
    entries.append(nb::make_tuple(sum.scanned, sum.sketched, sum.attended, sum.tail_rows,
                                  sum.code_bytes, sum.search_ns, sum.attend_ns));
  }
  return entries;
}

nb::list BudgetedBatch::selected() const {
  nb::list entries;
  for (const auto& lists : selected_) {
    nb::list arrays;
    for (const auto& list : lists) arrays.append(owned(list));
    entries.append(arrays);
  }
  return entries;
}

}  // namespace longreach
