#!/usr/bin/env bash
# Submit one of this folder's jobs, with a copy of the current code.
set -euo pipefail

usage() {
    cat <<'END'
usage: launch/submit.sh [--dry-run] [OPTION OF SBATCH]... KIND [ARGUMENT]...

KIND is train, sweep, shard, evaluate or command. The first lines of launch/KIND.sbatch describe its
arguments. sbatch options come from launch/cluster.env; those given here are added, each as one word
(--nodes=2).

The code is copied, so later changes do not affect a waiting job. The copy, the log and resubmit.sh,
which submits the same job again, are in the run folder of a training, or in a folder below $RUNS/jobs
for other jobs. Only the job number goes to stdout.

  --dry-run  print the sbatch command without submitting it
END
}

fail() {
    echo "error: $*" >&2
    exit 2
}

cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.."
# shellcheck source=launch/job.sh
source launch/job.sh

dry=no extra=() when=() name=
while [[ ${1:-} == -* ]]; do
    case $1 in
        -h | --help)
            usage
            exit 0
            ;;
        --dry-run) dry=yes ;;
        # not kept for a resubmission, when the jobs to wait for no longer exist
        --dependency=* | --kill-on-invalid-dep=*) when+=("$1") ;;
        --job-name=*)
            name=${1#*=}
            extra+=("$1")
            ;;
        *) extra+=("$1") ;;
    esac
    shift
done
kind=${1:-}
[[ $kind =~ ^(train|sweep|shard|evaluate|command)$ ]] ||
    fail "unknown job ${kind:-(none given)}; choose train, sweep, shard, evaluate or command (write each" \
        "sbatch option as one word, such as --nodes=2)"
shift
[ -e launch/cluster.env ] ||
    fail "copy launch/cluster.env.example to launch/cluster.env and edit it"
# shellcheck source=launch/cluster.env.example
source launch/cluster.env
refuse_credentials "$@" "$DATA" "${TRAIN_OPTIONS[@]}"

case $kind in
    train)
        [ $# != 0 ] || fail "name a recipe to train; python -m rft.train --help lists them"
        folder=$(run_folder "$@")
        ;;
    shard)
        [[ ${1:-} =~ ^(imagenet|ood)$ ]] || fail "choose what to pack: imagenet or ood"
        name=${name:-shard-$1}
        ;;
    sweep)
        [ -z "$(option --run-dir "$@")$(option --run "$@")$(option --seed "$@")" ] ||
            fail "a sweep sets the run folder and the seed of each task; omit --run-dir and --seed"
        ;;
    command) [[ ${1:-} =~ ^(python|torchrun)$ ]] || fail "the command must start with python or torchrun" ;;
    evaluate) [ $# != 0 ] || fail "name at least one run to evaluate" ;;
esac
folder=${folder:-$(realpath -m "$RUNS/jobs/${name:-$kind}-$(date +%Y%m%d-%H%M%S)-$$")}
set_options "$kind" "$folder" "$@"
options+=("${extra[@]}")

if [ $dry = yes ]; then
    echo "sbatch $(quoted "${options[@]}" "${when[@]}" "launch/$kind.sbatch" "$@")"
    exit 0
fi
require_own_logs "$folder"
snapshot "$PWD" "$folder/code"
leave_resubmit "$folder" "$kind" "${options[@]}" -- "$@"
number=$("$folder/resubmit.sh" --parsable "${when[@]}")
echo "submitted ${name:-$kind} as job $number; log: $(quoted "$folder")/job-$number*.log" >&2
echo "${number%%;*}"
