#!/usr/bin/env bash
# Submit one job of this folder, with the code as it is now.
set -euo pipefail

usage() {
    cat <<'END'
usage: launch/submit.sh [--dry-run] [OPTION OF SBATCH]... KIND [ARGUMENT]...

KIND is train, sweep, shard, evaluate or command: launch/KIND.sbatch, whose first lines say what its
arguments are. What sbatch needs is in launch/cluster.env; its options here come on top, each as one
word (--nodes=2).

The code is copied, so that later changes do not reach a job that waits, and a script is left that
submits the same job again: for a training in its run folder, for others in a folder below
$RUNS/jobs. The log is there, too. The job's number is all that goes to stdout.

  --dry-run  print what would be submitted, and do nothing
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
        # the jobs that it waits for will be gone when this one is submitted again
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
    fail "${kind:-nothing} is no kind of job; choose train, sweep, shard, evaluate or command (an" \
        "option of sbatch is one word, such as --nodes=2)"
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
        [[ ${1:-} =~ ^(imagenet|ood)$ ]] || fail "name what to pack, imagenet or ood"
        name=${name:-shard-$1}
        ;;
    sweep)
        [ -z "$(option --run-dir "$@")$(option --run "$@")$(option --seed "$@")" ] ||
            fail "the tasks of a sweep have a folder and a seed of their own"
        ;;
    command) [[ ${1:-} =~ ^(python|torchrun)$ ]] || fail "name a command of python or torchrun" ;;
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
