#!/usr/bin/env bash
# Saves a built image for upload.   ./export.sh [TAG]      (TAG: lung-registration) writes TAG.tar.gz into the current folder
set -euo pipefail
[ $# -le 1 ] || { echo "usage: export.sh [TAG]" >&2; exit 2; }

tag=${1:-lung-registration}
docker image inspect "$tag" >/dev/null 2>&1 || { echo "export.sh: there is no image $tag; ./build.sh makes it." >&2; exit 1; }
file=${tag//[\/:]/_}.tar.gz
trap 'rm -f "$file.part"' EXIT
docker save "$tag" | gzip >"$file.part"
mv "$file.part" "$file"
echo "$file ($(du -h "$file" | cut -f1))"
