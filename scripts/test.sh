#!/usr/bin/env bash
# The tests, from nothing: a venv in the checkout, the install, pytest.
#
#   bash scripts/test.sh          everything that needs no torch, ≤ 10 minutes
#   bash scripts/test.sh --all    and the slow tests and parity with torch
set -euo pipefail
cd "$(dirname "$0")/.."

extras=test marks="not slow"
# Compiling dominates: the fast tier leaves LLVM's optimiser out.
flags="--xla_backend_optimization_level=0"
if [[ "${1:-}" == "--all" ]]; then
  extras=test,parity marks="slow or not slow" flags=""
  shift
fi

[[ -x .venv/bin/python ]] || python3 -m venv .venv
.venv/bin/pip install --quiet --editable ".[$extras]"
XLA_FLAGS="${XLA_FLAGS:-} $flags" \
  .venv/bin/python -m pytest -n 2 -m "$marks" --durations=10 "$@"
