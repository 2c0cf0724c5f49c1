// Instruction-set tier and thread pool.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "binding.h"
#include "isa.h"
#include "thread_pool.h"

namespace longreach {

void bind_isa(nb::module_& module) {
  module.def("isa", &isa_name, "Name of the instruction-set tier in use.");
  module.def("supported_isas", &supported_isas, "Tiers this CPU can run, slowest first.");
  module.def("set_isa", &set_isa, nb::arg("name"), "Uses the named tier from now on.");
  module.def("set_threads", &set_threads, nb::arg("threads"), nb::arg("pin") = false,
             "Replaces the thread pool; `threads` counts the calling thread.");
  module.def("threads", [] { return shared_pool()->threads(); }, "Size of the thread pool.");
}

}  // namespace longreach
