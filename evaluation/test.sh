#!/usr/bin/env bash
# Builds the evaluation's image and runs it offline, with as few rights as can be, on two small made-up cases.
#
#   evaluation/test.sh      needs docker and ./setup_venv.sh requirements.txt requirements-dev.txt
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -eq 0 ] || { echo "usage: test.sh" >&2; exit 2; }
python=.venv/bin/python
image=lung-registration-evaluation:test

work=$(mktemp -d)
clean() { # what another user wrote can only be removed once it is everybody's
  docker run --rm --network none --user 0 --entrypoint chmod --volume "$work:/work" "$image" -R a+rwX /work || true
  rm -rf "$work"
}
trap clean EXIT
fail() { echo "evaluation/test.sh: FAILED: $*" >&2; exit 1; }

# run_image USER NAME: the image on $work/NAME, into $work/NAME/output. With an empty /etc/passwd: some engines add an
# entry for USER there, others do not, and the image has to do without.
run_image() {
  local folder=$work/$2
  mkdir -p "$folder/output"
  chmod 777 "$folder/output"
  docker run --rm --network none --read-only --cap-drop ALL --security-opt no-new-privileges --user "$1" \
    --memory 4g --shm-size 64m --tmpfs /tmp --workdir /tmp --volume "$work/passwd:/etc/passwd:ro" \
    --volume "$folder/input:/input:ro" --volume "$folder/ground_truth:/opt/ml/input/data/ground_truth:ro" \
    --volume "$folder/output:/output" "$image"
}

# check_result USER NAME FAILED: complete results that everybody can read, with so many failed cases.
check_result() {
  local output=$work/$2/output file
  run_image "$1" "$2"
  for file in metrics.json cases.csv landmarks.csv report.html; do
    [ -s "$output/$file" ] || fail "$2: no $file"
  done
  [ "$(find "$output" -mindepth 1 | wc -l)" = 4 ] || fail "$2: other files than these four: $(ls -A "$output")"
  [ -z "$(find "$output" -mindepth 1 ! -perm -o=r)" ] || fail "$2: a result that only its owner can read"
  "$python" -m tests.support.made_up_cases check "$output/metrics.json" "$3"
}

./evaluation/build.sh "$image"
found=$(docker image inspect --format \
  '{{.Architecture}} {{.Config.User}} {{index .Config.Labels "org.grand-challenge.api-method"}}' "$image")
[ "$found" = "amd64 user exec" ] || fail "the image is '$found', expected 'amd64 user exec'"

: >"$work/passwd"
for name in folders platform; do "$python" -m tests.support.made_up_cases make "$name" "$work/$name"; done
mkdir -p "$work/empty/input" "$work/empty/ground_truth/case_1"
cp -r "$work/folders" "$work/broken"
echo "this is no image" >"$(find "$work/broken/input" -name '*.mha' | sort | head -n 1)"
chmod -R a+rX "$work"

check_result 1000 folders 0
check_result 54321:54321 platform 0
check_result 54321:54321 broken 1

code=0
run_image 1000 empty 2>"$work/errors" || code=$?
[ "$code" = 2 ] || fail "no fields: exit code $code, expected 2: $(cat "$work/errors")"
tail -n 1 "$work/errors" | grep -qF "found no displacement field" || fail "no sentence: $(cat "$work/errors")"
if grep -qF Traceback "$work/errors"; then fail "a traceback: $(cat "$work/errors")"; fi
echo "evaluation/test.sh: the image passed."
