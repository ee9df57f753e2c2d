#!/usr/bin/env bash
# All tests: style, types, unit and property tests; then, where docker answers, the image for each of the platform's
# methods: built, and run offline with as few rights as can be.      ./test.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
[ $# -eq 0 ] || { echo "usage: test.sh" >&2; exit 2; }
python=.venv/bin/python
image=lung-registration:test

./setup_venv.sh requirements.txt requirements-cohort.txt requirements-dev.txt
"$python" -m ruff check
"$python" -m ruff format --check
"$python" -m mypy
"$python" -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

if ! docker info >/dev/null 2>&1; then
  echo "test.sh: docker does not answer, so the image was not tested."
  exit
fi

# ---- The image ------------------------------------------------------------------------------------------------------

work=$(mktemp -d)
server=
clean() { # what another user wrote can only be removed once it is everybody's
  [ -z "$server" ] || docker rm --force "$server" >/dev/null || true
  docker run --rm --network none --user 0 --entrypoint chmod --volume "$work:/work" "$image" -R a+rwX /work || true
  rm -rf "$work"
}
trap clean EXIT
fail() { echo "test.sh: FAILED: $*" >&2; exit 1; }

# Offline, with few rights. With an empty /etc/passwd: some engines add an entry for the user there, others do not, and
# the image has to do without.
confined=(--network none --read-only --cap-drop ALL --security-opt no-new-privileges --shm-size 128m
  --volume "$work/passwd:/etc/passwd:ro")
given=(--memory 8g --tmpfs /tmp)

# check_labels IMAGE METHOD
check_labels() {
  local found
  found=$(docker image inspect --format \
    '{{.Architecture}} {{.Config.User}} {{index .Config.Labels "org.grand-challenge.api-method"}}' "$1")
  [ "$found" = "amd64 user $2" ] || fail "$1 is '$found', expected 'amd64 user $2'"
}

# run_image USER NAME: the image on $work/NAME/input, into $work/NAME/output.
run_image() {
  local folder=$work/$2
  mkdir -p "$folder/output"
  chmod 777 "$folder/output"
  docker run --rm "${confined[@]}" "${given[@]}" --user "$1" \
    --volume "$folder/input:/input:ro" --volume "$folder/output:/output" "$image" --device cpu
}

# check_result USER NAME DIMENSIONS: the result is the expected one, its field has so many axes, everybody can read it.
check_result() {
  local output=$work/$2/output
  run_image "$1" "$2"
  [ -z "$(find "$output" ! -perm -o=r)" ] || fail "$2: a result that only its owner can read"
  head -c 200 "$output"/images/displacement-field/*.mha | grep -aqx "NDims = $3" || fail "$2: a field not of $3 axes"
  "$python" -m tests.support.golden_check "$output" "$work/example"
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

# check_killed NAME: stopped by the kernel, half-way, and nothing is left. podman leaves a file "oom" where it was called.
check_killed() {
  local code=0 errors=$work/$1/errors
  (cd "$work" && run_image 1000 "$1") >"$work/$1/steps" 2>"$errors" || code=$?
  [ "$code" = 137 ] || fail "$1: exit code $code, expected 137: $(cat "$errors")"
  grep -q 'Reading the scans' "$work/$1/steps" || fail "$1: killed before it began"
  [ -z "$(find "$work/$1/output" -mindepth 1)" ] || fail "$1: something was written"
}

./build.sh "$image"
check_labels "$image" exec

: >"$work/passwd"
"$python" -m phantom "$work/example" --size 48 48 48 --inputs names folders interface
"$python" -m phantom "$work/example" --size 48 48 48 --inputs socket --masks
for form in names folders interface socket; do
  mkdir "$work/$form"
  mv "$work/example/inputs/$form" "$work/$form/input"
done
mkdir -p "$work"/{no_moving,not_an_image,no_scratch,little_memory}/input "$work/nothing"
cp "$work"/names/input/* "$work/no_scratch/input"
cp "$work"/names/input/* "$work/little_memory/input"
cp "$work/example/fixed.mha" "$work/no_moving/input"
cp "$work/example/moving.mha" "$work/not_an_image/input"
echo "this is no image" >"$work/not_an_image/input/fixed.mha"
chmod -R a+rX "$work"

check_result 1000 names 3
check_result 1000 folders 3
check_result 54321:54321 interface 4
check_result 54321:54321 socket 4
check_refusal no_moving moving
check_refusal not_an_image fixed.mha

# As Apptainer runs it: in the caller's folder, which may hold modules of the same names, with a home that is not there.
mkdir "$work/caller"
for module in algorithm imagefiles torch json; do echo 'raise SystemExit("of the caller")' >"$work/caller/$module.py"; done
mkdir -p "$work/elsewhere/input"
cp "$work"/names/input/* "$work/elsewhere/input"
chmod -R a+rX "$work"/{caller,elsewhere}
given=(--memory 8g --tmpfs /tmp --volume "$work/caller:/caller:ro" --workdir /caller --env HOME=/not/there)
check_result 54321:54321 elsewhere 3
docker run --rm "${confined[@]}" "${given[@]}" --user 54321:54321 --entrypoint env "$image" \
  -u HOME python -m algorithm --version >/dev/null || fail "without HOME it does not start"

given=(--memory 8g --volume "$work/nothing:/tmp:ro")
check_result 54321:54321 no_scratch 3
given=(--memory 500m --memory-swap 500m --tmpfs /tmp)
check_killed little_memory
given=(--memory 8g --tmpfs /tmp)
echo "test.sh: the image passed."

# ---- The image with the server --------------------------------------------------------------------------------------

# request METHOD PATH: status and body of the server's answer. Asked from inside: there is no network.
request() {
  docker exec "$server" python -c '
import sys
from urllib.error import HTTPError
from urllib.request import Request, urlopen
try:
    answer = urlopen(Request("http://127.0.0.1:4743" + sys.argv[2], method=sys.argv[1]))
except HTTPError as error:
    answer = error
print(answer.status, answer.read().decode().strip())' "$1" "$2"
}

# wait_for SECONDS COMMAND...: until it succeeds.
wait_for() {
  local end=$((SECONDS + $1))
  until "${@:2}"; do
    [ "$SECONDS" -lt "$end" ] || fail "not in time: ${*:2}: $(docker logs "$server" 2>&1 | tail -n 20)"
    sleep 0.5
  done
}
is_healthy() { [ "$(request GET /health 2>/dev/null)" = "200 ready" ]; }
is_busy() { docker logs "$server" 2>/dev/null | tail -n 1 | grep -q '\.\.\.$'; } # a step that has begun

# refill NAME: the server's /input is that of NAME, its /output is empty.
refill() {
  find "$work/server/input" -mindepth 1 -delete
  cp -r "$work/$1/input/." "$work/server/input"
  chmod -R a+rX "$work/server/input"
  docker exec "$server" find /output -mindepth 1 -delete
}

# check_invoked NAME: the images are, byte by byte, those that run_image made.
check_invoked() {
  local answer
  refill "$1"
  answer=$(request POST /invoke)
  [ "$answer" = "201 done" ] || fail "$1: the server answers '$answer', expected '201 done'"
  diff -r "$work/$1/output/images" "$work/server/output/images" || fail "$1: other images than without the server"
  [ -s "$work/server/output/results.json" ] || fail "$1: the server wrote no results.json"
}

# check_refused NAME WORD: 422 and a sentence that holds WORD, on stderr as well; nothing is written.
check_refused() {
  local answer
  refill "$1"
  answer=$(request POST /invoke)
  [[ $answer == "422 "*"$2"* ]] || fail "$1: the server answers '$answer', expected 422 and '$2'"
  docker logs "$server" 2>&1 >/dev/null | tail -n 1 | grep -qF "${answer#422 }" || fail "$1: nothing on stderr"
  [ -z "$(find "$work/server/output" -mindepth 1)" ] || fail "$1: something was written"
}

API_METHOD=invoke ./build.sh "$image-invoke"
check_labels "$image-invoke" invoke

mkdir -p "$work"/server/{input,output}
chmod 777 "$work/server/output"
server=$(docker run --detach "${confined[@]}" "${given[@]}" --user 54321:54321 --volume "$work/server/input:/input:ro" \
  --volume "$work/server/output:/output" "$image-invoke" --device cpu)
wait_for 120 is_healthy

check_invoked names
check_invoked socket
check_refused no_moving moving
check_invoked folders
check_refused not_an_image fixed.mha
check_invoked interface
check_invoked names

refill names
request POST /invoke >/dev/null 2>&1 &
wait_for 60 is_busy
docker stop -t 5 "$server" >/dev/null
code=$(docker container inspect --format '{{.State.ExitCode}}' "$server")
[ "$code" = 0 ] || fail "exit code $code after SIGTERM during a case, expected 0 within 5 s"
[ -z "$(find "$work/server/output" -mindepth 1)" ] || fail "SIGTERM during a case left something in /output"
echo "test.sh: the server passed."

# ---- The evaluation, and what it says of the results above ----------------------------------------------------------

./evaluation/test.sh
mkdir -p "$work"/evaluation/{input,output}
for form in names socket; do # both layouts of the field
  mkdir -p "$work/evaluation/ground_truth/$form"
  cp "$work"/example/{fixed,moving}_{landmarks.csv,lobes.mha} "$work/evaluation/ground_truth/$form"
  cp -r "$work/$form/output" "$work/evaluation/input/$form"
done
chmod -R a+rX "$work/evaluation"
chmod 777 "$work/evaluation/output"
docker run --rm "${confined[@]}" "${given[@]}" --user 54321:54321 --volume "$work/evaluation/input:/input:ro" \
  --volume "$work/evaluation/ground_truth:/opt/ml/input/data/ground_truth:ro" \
  --volume "$work/evaluation/output:/output" lung-registration-evaluation:test
"$python" -c '
import json, sys
results = json.load(open(sys.argv[1]))["results"]
assert [result["case"] for result in results] == ["names", "socket"], results
for result in results:
    assert result["error"] is None, result["error"]
    assert result["tre_mm"]["mean"] < result["tre_initial_mm"]["mean"] / 2, result["tre_mm"]
    assert len(result["dice"]) == 6 and result["dice"]["mean"] > 0.8, result["dice"]
    assert result["folding_percent_all"] == 0, result["folding_percent_all"]
' "$work/evaluation/output/metrics.json" || fail "the evaluation of the results: $(cat "$work/evaluation/output/cases.csv")"
echo "test.sh: the results passed their evaluation."
