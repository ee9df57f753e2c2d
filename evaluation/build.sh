#!/usr/bin/env bash
# Builds the evaluation's image.   evaluation/build.sh [TAG]      (TAG: lung-registration-evaluation)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -le 1 ] || { echo "usage: build.sh [TAG]" >&2; exit 2; }

revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
[ -z "$(git status --porcelain evaluation imagefiles resultpages 2>/dev/null)" ] || revision+=-modified
docker build --platform linux/amd64 --build-arg REVISION="$revision" --tag "${1:-lung-registration-evaluation}" \
  --file evaluation/Dockerfile .
