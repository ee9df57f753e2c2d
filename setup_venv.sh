#!/usr/bin/env bash
# Makes .venv beside this file, with what the given requirements files name. Silent and quick when that is done already.
#
#   ./setup_venv.sh REQUIREMENTS_FILE...
#
# The stamp of an installed file is a copy of it in .venv/installed: it goes before pip starts and comes back when pip
# has succeeded, so that neither an edit nor an interrupted installation is taken for done.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
[ $# -gt 0 ] || { echo "usage: setup_venv.sh REQUIREMENTS_FILE..." >&2; exit 2; }

find_python() {
  local name
  for name in python3.11 python3.12 python3.13 python3.14 python3; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "setup_venv.sh: found no Python 3.11 or newer (python3 is $(python3 -V 2>&1 || true)); please install one." >&2
  return 1
}

make_venv() {
  local python
  python=$(find_python)
  if ! "$python" -m venv --clear .venv >&2; then
    echo "setup_venv.sh: $python cannot make a virtual environment; on Debian and Ubuntu install ${python}-venv." >&2
    return 1
  fi
}

stale=()
for file; do
  if [ ! -x .venv/bin/python ] || ! cmp -s "$file" ".venv/installed/$file"; then stale+=("$file"); fi
done
[ ${#stale[@]} -gt 0 ] || exit 0

echo "Setting up .venv for ${stale[*]}: once, some minutes ..." >&2
.venv/bin/python -m pip --version >/dev/null 2>&1 || make_venv
for file in "${stale[@]}"; do
  mkdir -p "$(dirname ".venv/installed/$file")"
  rm -f ".venv/installed/$file"
  .venv/bin/python -m pip install -qq --disable-pip-version-check --requirement "$file" >&2
  cp "$file" ".venv/installed/$file"
done
.venv/bin/python -m resultpages.fetch || true # the viewer of the pages; they do without, and it says so
