// The compiled module retrieval_node._native.
#include "binding.h"
#include "isa.h"

NB_MODULE(_native, module) {
  module.doc() = "Native kernels of the retrieval node; see retrieval_node.kernel.";
  longreach::choose_isa_from_environment();
  longreach::bind_isa(module);
  longreach::bind_exact(module);
  longreach::bind_chosen(module);
  longreach::bind_sketch(module);
  longreach::bind_graph(module);
}
