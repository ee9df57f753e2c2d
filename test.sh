#!/usr/bin/env bash
# All tests: style, types, unit and property tests; then, where docker answers, the image: built, and run offline with
# as few rights as can be.      ./test.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
[ $# -eq 0 ] || { echo "usage: test.sh" >&2; exit 2; }
python=.venv/bin/python
image=lung-registration:test

./setup_venv.sh requirements.txt requirements-dev.txt
"$python" -m ruff check
"$python" -m ruff format --check
"$python" -m mypy
"$python" -m pytest

if ! docker info >/dev/null 2>&1; then
  echo "test.sh: docker does not answer, so the image was not tested."
  exit
fi

# ---- The image ------------------------------------------------------------------------------------------------------

work=$(mktemp -d)
clean() { # what another user wrote can only be removed once it is everybody's
  docker run --rm --network none --user 0 --entrypoint chmod --volume "$work:/work" "$image" -R a+rwX /work || true
  rm -rf "$work"
}
trap clean EXIT
fail() { echo "test.sh: FAILED: $*" >&2; exit 1; }

# run_image USER NAME: the image on $work/NAME/input, into $work/NAME/output. With an empty /etc/passwd: some engines
# add an entry for USER there, others do not, and the image has to do without.
run_image() {
  local folder=$work/$2
  mkdir -p "$folder/output"
  chmod 777 "$folder/output"
  docker run --rm --network none --read-only --cap-drop ALL --security-opt no-new-privileges --user "$1" \
    --memory 8g --shm-size 128m --tmpfs /tmp --volume "$work/passwd:/etc/passwd:ro" \
    --volume "$folder/input:/input:ro" --volume "$folder/output:/output" "$image" --device cpu
}

check_labels() {
  local found
  found=$(docker image inspect --format \
    '{{.Architecture}} {{.Config.User}} {{index .Config.Labels "org.grand-challenge.api-method"}}' "$image")
  [ "$found" = "amd64 user exec" ] || fail "the image is '$found', expected 'amd64 user exec'"
}

# check_result USER NAME DIMENSIONS: the result is the expected one, its field has so many axes, everybody can read it.
check_result() {
  local output=$work/$2/output
  run_image "$1" "$2"
  [ -z "$(find "$output" ! -perm -o=r)" ] || fail "$2: a result that only its owner can read"
  head -c 200 "$output"/images/displacement-field/*.mha | grep -aqx "NDims = $3" || fail "$2: a field not of $3 axes"
  "$python" -m tests.golden_check "$output" "$work/example"
}

# check_refusal NAME WORD: exit code 2, a last sentence on stderr that holds WORD, no traceback, nothing written.
check_refusal() {
  local code=0 errors=$work/$1/errors
  run_image 1000 "$1" 2>"$errors" || code=$?
  [ "$code" = 2 ] || fail "$1: exit code $code, expected 2: $(cat "$errors")"
  tail -n 1 "$errors" | grep -qF "$2" || fail "$1: the last line of stderr does not say '$2': $(cat "$errors")"
  if grep -qF Traceback "$errors"; then fail "$1: a traceback: $(cat "$errors")"; fi
  [ -z "$(find "$work/$1/output" -mindepth 1)" ] || fail "$1: something was written"
}

./build.sh "$image"
check_labels

: >"$work/passwd"
"$python" -m phantom "$work/example" --size 48 48 48
mkdir -p "$work"/{folder,no_moving,not_an_image}/input "$work"/platform/input/images/{fixed,moving}
cp "$work"/example/{fixed,moving}.mha "$work/folder/input"
cp "$work/example/fixed.mha" "$work/platform/input/images/fixed/a.mha"
cp "$work/example/moving.mha" "$work/platform/input/images/moving/b.mha"
echo '[{"socket": {"slug": "fixed-image", "relative_path": "images/fixed"}},
       {"socket": {"slug": "moving-image", "relative_path": "images/moving"}}]' >"$work/platform/input/inputs.json"
cp "$work/example/fixed.mha" "$work/no_moving/input"
cp "$work/example/moving.mha" "$work/not_an_image/input"
echo "this is no image" >"$work/not_an_image/input/fixed.mha"
chmod -R a+rX "$work"

check_result 1000 folder 3
check_result 54321:54321 platform 4
check_refusal no_moving moving
check_refusal not_an_image fixed.mha
echo "test.sh: the image passed."
./evaluation/test.sh
