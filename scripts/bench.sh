#!/usr/bin/env bash
# The benchmark, from nothing: a venv for dpo_jax and one for each group of its
# peers, whose needs may clash, the installs, and scripts/bench.py.
#
#   bash scripts/bench.sh            all cases, over an hour on two cores
#   bash scripts/bench.sh --quick    the headline case, with all peers
#   bash scripts/bench.sh --device   accelerators; TRL too if it is in the venv
#
# Options are those of scripts/bench.py; --help shows them.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1

install() { # VENV EXTRA
  [[ "$1/bench" -nt setup.py ]] && return
  [[ -x "$1/bin/python" ]] || "${PYTHON:-python3}" -m venv "$1"
  echo "━━ pip install .[$2] into $1"
  "$1/bin/pip" install --quiet --no-compile --editable ".[$2]"
  touch "$1/bench"
}

install .venv test
case " $* " in
  # No peers of the CPU cases.
  *" --device "* | *" --smoke "* | *" --table "* | *" --help "*) ;;
  *)
    install .venv-bench-torch bench-torch
    install .venv-bench-jax bench-jax
    ;;
esac
exec .venv/bin/python scripts/bench.py "$@"
