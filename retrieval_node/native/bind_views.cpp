// Checks arrays from Python and turns them into views.
#include <cmath>
#include <limits>
#include <stdexcept>

#include "binding.h"

namespace longreach {
namespace {

constexpr int64_t kLargestDim = 4096;

bool has_type(const AnyArray& array, Storage storage) {
  return storage == Storage::kFloat32 ? array.dtype() == nb::dtype<float>()
                                      : array.dtype() == nb::dtype<uint16_t>();
}

// Rows of a [heads, n, dim] array; the last axis must be dense.
Rows rows_of(const AnyArray& array, Storage storage, const char* what) {
  const std::string name(what);
  require(array.ndim() == 3, name + " has " + std::to_string(array.ndim()) + " axes; expected 3");
  require(has_type(array, storage), name + " does not have the element type of its storage");
  const int64_t dim = static_cast<int64_t>(array.shape(2));
  require(dim >= 1 && dim <= kLargestDim, name + " has rows of " + std::to_string(dim) +
                                              "; expected 1 to " + std::to_string(kLargestDim));
  require(array.stride(2) == 1 || dim == 1, name + " needs dense rows (last stride 1)");
  require(array.stride(0) >= 0 && array.stride(1) >= 0, name + " has a negative stride");
  return {array.data(), storage, static_cast<int>(dim), array.stride(1)};
}

}  // namespace

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

Storage storage_named(const std::string& name) {
  if (name == "float32") return Storage::kFloat32;
  if (name == "float16") return Storage::kFloat16;
  if (name == "bfloat16") return Storage::kBfloat16;
  throw std::invalid_argument("unknown storage \"" + name +
                              "\"; known: float32, float16, bfloat16");
}

LayerKv layer_view(const AnyArray& keys, const AnyArray& values, const std::string& storage) {
  const Storage type = storage_named(storage);
  const Rows key_rows = rows_of(keys, type, "keys");
  const Rows value_rows = rows_of(values, type, "values");
  require(keys.shape(0) == values.shape(0) && keys.shape(1) == values.shape(1),
          "keys and values differ in heads or length");
  require(keys.shape(1) < static_cast<size_t>(std::numeric_limits<int32_t>::max()),
          "more than 2^31 - 2 keys in one shard; split the context into spans");
  return {key_rows,
          value_rows,
          keys.stride(0),
          values.stride(0),
          static_cast<int>(keys.shape(0)),
          static_cast<int64_t>(keys.shape(1))};
}

AttentionRows rows_view(const LayerKv& kv, const FloatsIn& queries, int64_t head_start,
                        int64_t start, int64_t stop, const FloatsOut& output,
                        const FloatsOut& lse) {
  require(queries.ndim() == 4, "queries need 4 axes [rows, heads, group, head_dim]");
  const int64_t rows = queries.shape(0), heads = queries.shape(1), group = queries.shape(2);
  require(queries.shape(3) == kv.keys.dim,
          "queries have head_dim " + std::to_string(queries.shape(3)) + " and keys have " +
              std::to_string(kv.keys.dim));
  require(head_start >= 0 && heads <= kv.kv_heads && head_start <= kv.kv_heads - heads,
          std::to_string(heads) + " KV heads from " + std::to_string(head_start) +
              " on are not all among the " + std::to_string(kv.kv_heads) + " held");
  require(start >= 0 && start <= stop && stop <= kv.count,
          "scope [" + std::to_string(start) + ", " + std::to_string(stop) + ") is not within the " +
              std::to_string(kv.count) + " keys held");
  const auto matches = [&](const auto& array, int64_t last) {
    if (array.ndim() != (last ? 4u : 3u)) return false;
    return array.shape(0) == rows && array.shape(1) == heads && array.shape(2) == group &&
           (!last || array.shape(3) == last);
  };
  require(matches(output, kv.values.dim), "output must be [rows, heads, group, value_dim]");
  require(matches(lse, 0), "lse must be [rows, heads, group]");
  require(rows * group < std::numeric_limits<int32_t>::max(), "too many query rows in one entry");
  const size_t count = queries.size();
  bool finite = true;
  for (size_t i = 0; i < count; ++i) finite = finite && std::isfinite(queries.data()[i]);
  require(finite, "queries hold NaN or infinity");
  return {queries.data(),
          rows,
          static_cast<int>(heads),
          static_cast<int>(group),
          static_cast<int>(head_start),
          start,
          stop,
          output.data(),
          lse.data()};
}

LogitRule logit_rule(float scale, float softcap) {
  require(std::isfinite(scale), "scale is not finite");
  require(std::isfinite(softcap) && softcap >= 0, "softcap must be 0 (none) or positive");
  return {scale, softcap};
}

}  // namespace longreach
