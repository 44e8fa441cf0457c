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

cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.."
# shellcheck source=launch/job.sh
source launch/job.sh

# Fail if an argument is an option of sbatch or of this script: the job would take it for its own.
refuse_sbatch_options() {
    local word
    for word; do
        case ${word%%=*} in
            -h | --help | --dry-run | -[AJNnptw] | --account | --array | --cpus-per-task | --dependency | \
                --gpus* | --gres | --job-name | --mem | --nodelist | --nodes | --partition | --qos | --time)
                fail "${word%%=*} comes before the kind of job: launch/submit.sh ${word%%=*}... $kind"
                ;;
        esac
    done
}

# Fail for a recipe, seed or run folder that the training would refuse in the queue.
require_training() {
    local run said
    [[ ${1:--} != -* ]] || fail "name a recipe to train; python -m rft.train --help lists them"
    [[ $(option --seed --seed=0 "$@") =~ ^[0-9]+$ ]] || fail "--seed must be a number of at least 0"
    run=$(option --run-dir "--run-dir=$(option --run --run=. "$@")" "$@")
    [[ -n $run && $run != *://* ]] || fail "--run-dir must be a local folder"
    # only code 2 is a mistake; Python may not work on this machine but in the job
    said=$(
        set +u
        setup >/dev/null 2>&1
        python -c 'import sys; from rft import cli, recipes; cli.run(lambda: recipes.build(sys.argv[1]))' \
            "$1" 2>&1
    ) || [ $? != 2 ] || fail "${said#error: }"
}

# Print the number of this user's job, waiting or running, that logs to FOLDER.
job_of() {
    { timeout 10 squeue --noheader --user="$EUID" --Format=JobID:20,STDOUT:4000 2>/dev/null || true; } |
        while read -r number output; do
            if [[ $output == "$1"/job-* ]]; then echo "$number"; fi
        done | tail -n 1
}

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
kind=${1:-} before=${extra[*]: -1}
[[ $kind =~ ^(train|sweep|shard|evaluate|command)$ ]] ||
    fail "unknown job ${kind:-(none given)}${before:+ after $before}; choose train, sweep, shard, evaluate or command (write each" \
        "sbatch option as one word, such as --nodes=2)"
shift
while [[ ${1:-} == --dry-run ]]; do
    dry=yes
    shift
done
if [[ ${1:-} == @(-h|--help) ]]; then
    usage
    exit 0
fi
load_settings
refuse_credentials "$@" "$DATA" "${TRAIN_OPTIONS[@]}"

case $kind in
    train)
        require_training "$@"
        folder=$(run_folder "$@")
        ;;
    shard)
        [[ ${1:-} =~ ^(imagenet|ood)$ ]] || fail "choose what to pack: imagenet or ood"
        [ -n "$(option --source "$@")" ] || require_setting "${1^^}" '.+' "the folder of the images"
        name=${name:-shard-$1}
        ;;
    sweep)
        [ -z "$(option --run-dir "$@")$(option --run "$@")$(option --seed "$@")" ] ||
            fail "a sweep sets the run folder and the seed of each task; omit --run-dir and --seed"
        ;;
    command) [[ ${1:-} =~ ^(python|torchrun)$ ]] || fail "the command must start with python or torchrun" ;;
    evaluate) [ $# != 0 ] || fail "name at least one run to evaluate" ;;
esac
[ "$kind" = command ] || refuse_sbatch_options "$@"
folder=${folder:-$(realpath -m "$RUNS/jobs/${name:-$kind}-$(date +%Y%m%d-%H%M%S)-$$")}
set_options "$kind" "$folder" "$@"
options+=("${extra[@]}")

if [ $dry = yes ]; then
    echo "sbatch $(quoted "${options[@]}" "${when[@]}" "launch/$kind.sbatch" "$@")"
    exit 0
fi
require_own_logs "$folder"
require_replaceable "$folder/resubmit.sh"
require_replaceable "$folder/resubmit.sh.old"
number=$(job_of "$folder")
[ -z "$number" ] || echo "warning: job $number for $(quoted "$folder") is waiting or running already" >&2
created=()
for path in "$folder" "$folder/code"; do
    if [ ! -e "$path" ] && [ ! -L "$path" ]; then created+=("$path"); fi
done
snapshot "$PWD" "$folder/code"
[ -w "$folder" ] || fail "cannot write to $(quoted "$folder")"
if ! number=$(
    cd "$folder/code" && sbatch --parsable "${options[@]}" "${when[@]}" "launch/$kind.sbatch" "$@"
); then
    # sbatch also fails if SLURM took the job and its answer was lost
    number=$(job_of "$folder")
    [ -z "$number" ] || fail "sbatch failed, but job $number for $(quoted "$folder") exists; look at squeue --me"
    # with a resubmit.sh, another submission uses the folder by now
    if [ ${#created[@]} != 0 ] && [ ! -e "$folder/resubmit.sh" ]; then rm -rf "${created[0]}"; fi
    fail "sbatch failed, no job was submitted; $(quoted "$folder") is unchanged"
fi
number=${number%%;*}
shown=${log//%[jA]/$number}
echo "submitted ${name:-$kind} as job $number; log: $(quoted "$folder")/${shown//%a/*}" >&2
echo "$number"
leave_resubmit "$folder" "$kind" "${options[@]}" -- "$@"
