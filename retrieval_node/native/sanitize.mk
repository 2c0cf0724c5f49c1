# Sanitizer builds of the native module, and the kernel tests under them. Included by the Makefile,
# which defines BIN.
#
# Python itself is not instrumented, so the runtime is preloaded; leaks are not looked for, as the
# interpreter never frees everything. OpenBLAS's threads are off: they are not instrumented.

NATIVE_SOURCE := retrieval_node/native
NATIVE_TESTS := tests/unit/retrieval_node/test_node_kernel_*.py \
  tests/unit/retrieval_node/test_node_flat.py tests/unit/retrieval_node/test_node_sketch.py

define native_build
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/cmake -S $(NATIVE_SOURCE) -B build/$(1) -G Ninja \
	  -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -DLONGREACH_SANITIZE=$(2)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/cmake --build build/$(1)
endef

native_test = OPENBLAS_NUM_THREADS=1 PYTHONPATH=tests/sanitizers LONGREACH_NATIVE_BUILD=build/$(1) \
  $(BIN)/python -m pytest -q -p use_native_build -p no:cacheprovider $(NATIVE_TESTS)

.PHONY: sanitize sanitize-address sanitize-thread
sanitize: sanitize-address sanitize-thread ## Kernel tests under ASan, UBSan and TSan.

sanitize-address: ## Kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer.
	$(call native_build,address,address$(comma)undefined)
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  $(call native_test,address)

sanitize-thread: ## Kernel tests under ThreadSanitizer.
	$(call native_build,thread,thread)
	TSAN_OPTIONS=halt_on_error=1:report_signal_unsafe=0 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libtsan.so)" $(call native_test,thread)

comma := ,
