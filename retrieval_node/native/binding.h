// What the binding files share. Each concept has one bind_<concept>.cpp with one bind function,
// listed here and called by module.cpp.
//
// Bindings check every shape and stride (std::invalid_argument becomes ValueError), turn arrays
// into views, release the GIL and call free functions. No Python object goes further than this.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>

#include "bind_floats.h"
#include "exact.h"
#include "storage.h"

namespace longreach {

namespace nb = nanobind;

// Any CPU array, read only.
using AnyArray = nb::ndarray<nb::ro, nb::device::cpu>;

// "float32", "float16" or "bfloat16"; the latter two arrive as arrays of uint16.
Storage storage_named(const std::string& name);

// keys [kv_heads, n, head_dim] and values [kv_heads, n, value_dim] with dense rows.
LayerKv layer_view(const AnyArray& keys, const AnyArray& values, const std::string& storage);

// One entry of a batch: (queries, kv_head_start, start, stop, output, lse).
AttentionRows rows_view(const LayerKv& kv, const FloatsIn& queries, int64_t head_start,
                        int64_t start, int64_t stop, const FloatsOut& output, const FloatsOut& lse);

// Checks scale and softcap.
LogitRule logit_rule(float scale, float softcap);

// Throws std::invalid_argument unless `condition`.
void require(bool condition, const std::string& message);

void bind_isa(nb::module_& module);
void bind_exact(nb::module_& module);
void bind_chosen(nb::module_& module);
void bind_sketch(nb::module_& module);
void bind_graph(nb::module_& module);

}  // namespace longreach
