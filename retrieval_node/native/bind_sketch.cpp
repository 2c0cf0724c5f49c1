// The sketch.
#include <algorithm>

#include "bind_budgeted.h"
#include "isa.h"
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
          "a code needs 1 to " + std::to_string(kMostQuads) +
              " groups of four dimensions; this has " + std::to_string(eight) + " of 8 bits and " +
              std::to_string(four) + " pairs of 4 bits");
  return format;
}

int64_t groups_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

SketchHead head_view(const LayerKv& kv, const HeadTuple& tuple) {
  const auto& [eight, four, codes, summaries, model] = tuple;
  const CodeFormat format = format_of(eight, four);
  const int dim = kv.keys.dim, dims = format.dims();
  require(
      static_cast<int64_t>(codes.size()) == groups_of(kv.count, kCodeKeys) * format.block_bytes(),
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

// K, V and the sketches of a layer's KV heads, checked once: what does not change between calls is
// not looked at again on the token path.
class SketchLayer {
 public:
  SketchLayer(AnyArray keys, AnyArray values, const std::string& storage,
              std::vector<HeadTuple> heads)
      : keys_(std::move(keys)),
        values_(std::move(values)),
        heads_(std::move(heads)),
        kv_(layer_view(keys_, values_, storage)) {
    require(static_cast<int>(heads_.size()) == kv_.kv_heads, "one sketch per KV head is needed");
    for (const auto& head : heads_) views_.push_back(head_view(kv_, head));
  }

  nb::tuple attend(const std::vector<BudgetedEntry>& entries, float scale, float softcap,
                   bool want_selected) const {
    const LogitRule rule = logit_rule(scale, softcap);
    BudgetedBatch batch(kv_, entries, want_selected);
    {
      nb::gil_scoped_release unlocked;
      attend_sketch(kv_, views_, batch.entries(), rule);
    }
    return batch.results();
  }

 private:
  AnyArray keys_, values_;  // these and the heads' arrays are kept alive
  std::vector<HeadTuple> heads_;
  LayerKv kv_;
  std::vector<SketchHead> views_;
};

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
  require(
      static_cast<int64_t>(codes.size()) == groups_of(kv.count, kCodeKeys) * format.block_bytes(),
      "codes must have room for every key");
  require(static_cast<int64_t>(summaries.shape(0)) == groups_of(kv.count, kSummaryKeys) &&
              static_cast<int>(summaries.shape(1)) == kv.values.dim,
          "summaries must be [ceil(n / 64), value_dim]");
  nb::gil_scoped_release unlocked;
  const int64_t bad =
      encode_sketch(kv.keys, kv.count, format, weights.data(), bias.data(), codes.data());
  if (bad < 0) summarise_values(kv.values, kv.count, summaries.data());
  return bad;
}

using Weights = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Integers = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using IntegersOut = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
// slope, offset and reference of each head, and the softcap.
using TailTuple = std::tuple<FloatsIn, FloatsIn, FloatsIn, float>;

// The bare scan, so that every tier can be held to the specification.
int64_t scan(const Bytes& codes, int eight, int four, const Weights& weights,
             const Integers& thresholds, const IntegersOut& ids, const IntegersOut& scores,
             const std::optional<TailTuple>& tail, const FloatsOut& sums) {
  CodeQueries queries{};
  queries.format = format_of(eight, four);
  queries.heads = static_cast<int>(weights.shape(0));
  require(queries.heads >= 1 && queries.heads <= kCodeHeads &&
              static_cast<int>(weights.shape(1)) == queries.format.quads(),
          "weights must be [1 to 8 heads, eight + 2 * four]");
  for (int h = 0; h < queries.heads; ++h)
    std::copy_n(weights.data() + h * queries.format.quads(), queries.format.quads(),
                queries.weights[h]);
  const int64_t summaries = static_cast<int64_t>(sums.size()) / kCodeHeads;
  const int64_t keys = summaries * kSummaryKeys;
  require(static_cast<int64_t>(codes.size()) == keys * queries.format.key_bytes(),
          "codes must be of 64 keys for each row of sums [summaries, 8]");
  require(static_cast<int>(thresholds.size()) == queries.heads &&
              static_cast<int64_t>(ids.size()) == keys &&
              static_cast<int64_t>(scores.size()) == keys * queries.heads,
          "thresholds must be [heads], ids [keys] and scores [heads * keys]");
  CodeTail rule{};
  if (tail) {
    const auto& [slope, offset, reference, softcap] = *tail;
    require(static_cast<int>(slope.size()) == queries.heads &&
                static_cast<int>(offset.size()) == queries.heads &&
                static_cast<int>(reference.size()) == queries.heads,
            "slope, offset and reference must be [heads]");
    std::copy_n(slope.data(), queries.heads, rule.slope);
    std::copy_n(offset.data(), queries.heads, rule.offset);
    std::copy_n(reference.data(), queries.heads, rule.reference);
    rule.softcap = softcap;
    rule.sums = sums.data();
  }
  CodeHits hits{ids.data(), scores.data(), keys, 0};
  nb::gil_scoped_release unlocked;
  kernels().code_scan(codes.data(), queries, 0, summaries, thresholds.data(), hits,
                      tail ? &rule : nullptr);
  return hits.count;
}

int32_t nth_highest(const Integers& scores, int64_t wanted) {
  const auto count = static_cast<int64_t>(scores.size());
  require(wanted >= 1 && wanted <= kMostHighest && wanted <= count,
          "wanted must be 1 to " + std::to_string(kMostHighest) + " and no more than the scores");
  return kernels().nth_highest(scores.data(), count, wanted);
}

}  // namespace

void bind_sketch(nb::module_& module) {
  module.def("encode_sketch", &encode, nb::arg("keys"), nb::arg("values"), nb::arg("storage"),
             nb::arg("eight"), nb::arg("four"), nb::arg("weights"), nb::arg("bias"),
             nb::arg("codes"), nb::arg("summaries"),
             "Fills codes and value summaries of one head. Returns the first key that holds NaN or "
             "infinity, or -1.");
  module.def("scan_codes", &scan, nb::arg("codes"), nb::arg("eight"), nb::arg("four"),
             nb::arg("weights"), nb::arg("thresholds"), nb::arg("ids"), nb::arg("scores"),
             nb::arg("tail").none(), nb::arg("sums"),
             "The bare scan: fills ids and scores of codes above a threshold and, with `tail`, the "
             "summed weights of the others; returns how many were found.");
  module.def("nth_highest", &nth_highest, nb::arg("scores"), nb::arg("wanted"),
             "The `wanted`-th highest score.");
  nb::class_<SketchLayer>(module, "SketchLayer", "K, V and sketches of a layer, checked.")
      .def(nb::init<AnyArray, AnyArray, const std::string&, std::vector<HeadTuple>>(),
           nb::arg("keys"), nb::arg("values"), nb::arg("storage"), nb::arg("heads"))
      .def("attend", &SketchLayer::attend, nb::arg("entries"), nb::arg("scale"),
           nb::arg("softcap"), nb::arg("want_selected"),
           "Each entry's budget over the keys the sketches find: (figures, selected).");
}

}  // namespace longreach
