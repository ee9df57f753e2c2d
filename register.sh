#!/usr/bin/env bash
# Sets everything up on the first call, then hands over to the command `lungreg` (see ./register.sh --help).
#
#   ./register.sh [OPTIONS] FIXED MOVING OUT    the field, the warped moving image, results.json and report.html into OUT
#   ./register.sh COMMAND ...                   what is done with a result
#   ./register.sh                               the bundled example: a phantom that is generated, into example/output
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

needed=(requirements.txt)
case ${1:-} in
  evaluate | convert) needed+=(evaluation/requirements.txt);;
  cohort) needed+=(evaluation/requirements.txt requirements-cohort.txt);;
esac
"$here/setup_venv.sh" "${needed[@]}"

# -P and PYTHONPATH: our packages from beside this file, wherever the call comes from; relative paths stay the caller's.
run() { PYTHONPATH=$here "$here/.venv/bin/python" -P -m "$@"; }

if [ $# -eq 0 ]; then
  example=$here/example
  if [ ! -e "$example/complete" ]; then
    run phantom "$example"
    touch "$example/complete"
  fi
  set -- "$example/fixed.mha" "$example/moving.mha" "$example/output"
fi
run algorithm.command "$@"
