PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: proto
proto: ## Regenerate the protocol stubs in longreach/v1 from proto/.
	$(BIN)/python -m grpc_tools.protoc -Iproto \
	  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
	  --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. \
	  proto/longreach/v1/*.proto
