#!/usr/bin/env bash
# Registers two CT scans of the lungs; sets everything up on the first call.
#
#   ./register.sh [OPTIONS] FIXED MOVING OUT    the displacement field, the warped moving image, results.json and
#                                               report.html, a page to look at, into OUT
#   ./register.sh [OPTIONS]                     the same for the bundled example, into example/output
#
# OPTIONS go to `python -m algorithm` as they are: --refine off|fast|full, --device auto|cuda|cpu, --weights PATH,
# --fixed-mask PATH, --moving-mask PATH, --field-layout auto|itk|grand-challenge, --field-grid fixed|network,
# --report auto|on|off.
# Each of them takes one value (--name VALUE or --name=VALUE), so that VALUE is never taken for a file; after `--` only
# files follow. --version and --help print something and do nothing else. Exit code: that of the algorithm; 2 for wrong
# arguments.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

options=() files=()
while [ $# -gt 0 ]; do
  case $1 in
    --) shift; files+=("$@"); break;;
    -h | --help) sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit;;
    --version) sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$here/algorithm/__init__.py"; exit;;
    -*)
      case ${1%%=*} in
        --fixed-mask | --moving-mask | --weights | --device | --refine | --field-layout | --field-grid | --report) ;;
        *) echo "register.sh: $1 is no option here, expected one of those in --help; files after --." >&2; exit 2;;
      esac
      case $1 in
        *=*) options+=("$1"); shift;;
        *)
          [ $# -gt 1 ] || { echo "register.sh: $1 has no value, expected $1 VALUE." >&2; exit 2; }
          options+=("$1" "$2"); shift 2;;
      esac;;
    *) files+=("$1"); shift;;
  esac
done
if [ ${#files[@]} -ne 0 ] && [ ${#files[@]} -ne 3 ]; then
  echo "register.sh: got ${#files[@]} file arguments (${files[*]}), expected FIXED MOVING OUT or none." >&2
  exit 2
fi

"$here/setup_venv.sh" requirements.txt

# -P and PYTHONPATH: our packages from beside this file, wherever the call comes from; relative paths stay the caller's.
run() { PYTHONPATH=$here "$here/.venv/bin/python" -P -m "$@"; }

if [ ${#files[@]} -eq 0 ]; then
  example=$here/example
  if [ ! -e "$example/complete" ]; then
    run phantom "$example"
    touch "$example/complete"
  fi
  files=("$example/fixed.mha" "$example/moving.mha" "$example/output")
fi
run algorithm ${options[@]+"${options[@]}"} "--fixed=${files[0]}" "--moving=${files[1]}" "--output=${files[2]}"
echo "The results lie in ${files[2]}."
