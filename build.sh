#!/usr/bin/env bash
# Builds the algorithm's image.
#
#   ./build.sh [TAG]                         TAG: lung-registration
#   API_METHOD=invoke ./build.sh [TAG]       a server that keeps the model loaded, instead of one run per case (exec)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
[ $# -le 1 ] || { echo "usage: build.sh [TAG]" >&2; exit 2; }

method=${API_METHOD:-exec}
case $method in
  exec | invoke) ;;
  *) echo "build.sh: API_METHOD is '$method', expected exec or invoke." >&2; exit 2;;
esac
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' algorithm/__init__.py)
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
[ -z "$(git status --porcelain 2>/dev/null)" ] || revision+=-modified
docker build --platform linux/amd64 --build-arg API_METHOD="$method" \
  --build-arg VERSION="$version" --build-arg REVISION="$revision" --tag "${1:-lung-registration}" .
