// The sketch.
#include "bind_budgeted.h"
#include "sketch.h"

namespace longreach {
namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using BytesOut = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Halves = nb::ndarray<const uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using HalvesOut = nb::ndarray<uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// (eight, four, codes, summaries, model); the model is transform [head_dim + 1, head_dim], step
// [dims], low [dims], noise [dims] and variance [head_dim], one after another.
using HeadTuple = std::tuple<int, int, Bytes, Halves, FloatsIn>;

CodeFormat format_of(int eight, int four) {
  const CodeFormat format{eight, four};
  require(eight >= 0 && four >= 0 && eight <= kMostQuads && four <= kMostQuads &&
              format.quads() >= 1 && format.quads() <= kMostQuads,
          "a code needs 1 to " + std::to_string(kMostQuads) + " groups of four dimensions; this has " +
              std::to_string(eight) + " of 8 bits and " + std::to_string(four) + " pairs of 4 bits");
  return format;
}

int64_t groups_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

SketchHead head_view(const LayerKv& kv, const HeadTuple& tuple) {
  const auto& [eight, four, codes, summaries, model] = tuple;
  const CodeFormat format = format_of(eight, four);
  const int dim = kv.keys.dim, dims = format.dims();
  require(static_cast<int64_t>(codes.size()) ==
              groups_of(kv.count, kCodeKeys) * format.block_bytes(),
          "codes do not have the size of " + std::to_string(kv.count) + " keys");
  require(static_cast<int64_t>(summaries.shape(0)) == groups_of(kv.count, kSummaryKeys) &&
              static_cast<int>(summaries.shape(1)) == kv.values.dim,
          "summaries must be [ceil(n / 64), value_dim]");
  const int64_t transform = static_cast<int64_t>(dim + 1) * dim;
  require(static_cast<int64_t>(model.size()) == transform + 3 * dims + dim,
          "the model of a head has the wrong size");
  const float* at = model.data();
  return {format,
          codes.data(),
          {summaries.data(), Storage::kBfloat16, kv.values.dim, kv.values.dim},
          at,
          at + transform,
          at + transform + dims,
          at + transform + 2 * dims,
          at + transform + 3 * dims};
}

nb::list attend(const AnyArray& keys, const AnyArray& values, const std::string& storage,
                const std::vector<HeadTuple>& heads, const std::vector<BudgetedEntry>& entries,
                float scale, float softcap, bool want_selected) {
  const LayerKv kv = layer_view(keys, values, storage);
  const LogitRule rule = logit_rule(scale, softcap);
  require(static_cast<int>(heads.size()) == kv.kv_heads, "one sketch per KV head is needed");
  std::vector<SketchHead> views;
  for (const auto& head : heads) views.push_back(head_view(kv, head));
  BudgetedBatch batch(kv, entries, want_selected);
  {
    nb::gil_scoped_release unlocked;
    attend_sketch(kv, views, batch.entries(), rule);
  }
  return batch.selected();
}

// K and V of one head, as a layer of one.
int64_t encode(const AnyArray& keys, const AnyArray& values, const std::string& storage, int eight,
               int four, const FloatsIn& weights, const FloatsIn& bias, const BytesOut& codes,
               const HalvesOut& summaries) {
  const LayerKv kv = layer_view(keys, values, storage);
  const CodeFormat format = format_of(eight, four);
  require(kv.kv_heads == 1, "one head is encoded at a time");
  require(weights.ndim() == 2 && static_cast<int>(weights.shape(0)) == format.dims() &&
              static_cast<int>(weights.shape(1)) == kv.keys.dim,
          "weights must be [dims, head_dim]");
  require(static_cast<int>(bias.size()) == format.dims(), "bias must be [dims]");
  require(static_cast<int64_t>(codes.size()) ==
              groups_of(kv.count, kCodeKeys) * format.block_bytes(),
          "codes must have room for every key");
  require(static_cast<int64_t>(summaries.shape(0)) == groups_of(kv.count, kSummaryKeys) &&
              static_cast<int>(summaries.shape(1)) == kv.values.dim,
          "summaries must be [ceil(n / 64), value_dim]");
  nb::gil_scoped_release unlocked;
  const int64_t bad = encode_sketch(kv.keys, kv.count, format, weights.data(), bias.data(), codes.data());
  if (bad < 0) summarise_values(kv.values, kv.count, summaries.data());
  return bad;
}

}  // namespace

void bind_sketch(nb::module_& module) {
  module.def("encode_sketch", &encode, nb::arg("keys"), nb::arg("values"), nb::arg("storage"),
             nb::arg("eight"), nb::arg("four"), nb::arg("weights"), nb::arg("bias"),
             nb::arg("codes"), nb::arg("summaries"),
             "Fills codes and value summaries of one head. Returns the first key that holds NaN or "
             "infinity, or -1.");
  module.def("attend_sketch", &attend, nb::arg("keys"), nb::arg("values"), nb::arg("storage"),
             nb::arg("heads"), nb::arg("entries"), nb::arg("scale"), nb::arg("softcap"),
             nb::arg("want_selected"), "Each entry's budget over the keys the sketch finds.");
}

}  // namespace longreach
