#!/usr/bin/env bash
# Submit one of this folder's jobs, with a copy of the current code.
set -euo pipefail

usage() {
    cat <<'END'
usage: launch/submit.sh [--dry-run] [OPTION OF SBATCH]... KIND [ARGUMENT]...

KIND is train, sweep, shard, evaluate or command. The first lines of launch/KIND.sbatch describe its
arguments. sbatch options come from launch/cluster.env; those given here are added, each as one word
(--nodes=2).

The code is copied, so later changes do not affect a waiting job. The copy, the log and
resubmit-JOB.sh, which submits the same job again, are in the run folder of a training, or in a folder
below $RUNS/jobs for other jobs. Only the job number goes to stdout.

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

# Fail if one of the WORDS after a recipe is neither an option nor its value.
refuse_stray_words() {
    local word option=
    for word; do
        case $word in
            -*=*) option= ;;
            -*) option=$word ;;
            # the only option with several values
            *) [[ $option == --optim.freeze ]] || {
                [ -n "$option" ] || fail "$(quoted "$word") is neither an option nor the value of one"
                option=
            } ;;
        esac
    done
}

# Fail unless the array indices among the sbatch OPTIONS suit KIND.
require_array() {
    local word indices=
    for word; do
        case $word in
            --array=*) indices=${word#*=} ;;
            -a?*) indices=${word#-a} ;;
        esac
    done
    [ -n "$indices" ] || return 0
    case $kind in
        sweep) ;;
        shard)
            [[ $indices =~ ^0(-[0-9]+)?(%[0-9]+)?$ ]] ||
                fail "--array of shard must be 0-N, because each task packs its share of all"
            ;;
        *) fail "--array would run the same $kind several times; only sweep and shard take it" ;;
    esac
}

# Warn of the first WORDS, runs to evaluate, that do not exist.
warn_of_missing_runs() {
    local word
    for word; do
        if [[ $word == -* ]]; then return; fi
        [ -e "$word" ] || echo "warning: $(quoted "$word") does not exist; the job fails unless it does" \
            "when the job starts (--dependency=afterok:JOB waits for a training)" >&2
    done
}

# Undo the changes of a submission that failed: remove the copy of the code and the folders made for it.
remove_made() {
    if [ -n "$number" ] || [ ${#made[@]} = 0 ]; then return; fi
    # after an accepted submission the folder is in use
    if [ -n "$(find "$folder" -maxdepth 1 -name 'resubmit-*.sh' -print -quit)" ]; then return; fi
    rm -rf "${made[0]}"
    rmdir "${made[@]:1}" 2>/dev/null || true
}

dry=no extra=() name=
while [[ ${1:-} == -* ]]; do
    case $1 in
        -h | --help)
            usage
            exit 0
            ;;
        --dry-run) dry=yes ;;
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
if [ "$kind" = command ]; then refuse_sbatch_options "${1:-}"; else refuse_sbatch_options "$@"; fi
require_array "${extra[@]}"

case $kind in
    train)
        require_training "$@"
        refuse_stray_words "${@:2}"
        folder=$(run_folder "$@")
        ;;
    shard)
        [[ ${1:-} =~ ^(imagenet|ood)$ ]] || fail "choose what to pack: imagenet or ood"
        [ -n "$(option --source "$@")" ] || require_setting "${1^^}" '.+' "the folder of the images"
        name=${name:-shard-$1}
        ;;
    sweep)
        [[ ${1:--} == -* ]] ||
            fail "a sweep takes no recipe, it trains nine; for one: launch/submit.sh train $(quoted "$1")"
        refuse_stray_words "$@"
        [ -z "$(option --run-dir "$@")$(option --run "$@")$(option --seed "$@")" ] ||
            fail "a sweep sets the run folder and the seed of each task; omit --run-dir and --seed"
        ;;
    command) [[ ${1:-} =~ ^(python|torchrun)$ ]] || fail "the command must start with python or torchrun" ;;
    evaluate)
        [ $# != 0 ] || fail "name at least one run to evaluate"
        [ -n "$(option --dependency "${extra[@]}")" ] || warn_of_missing_runs "$@"
        ;;
esac
folder=${folder:-$(realpath -m "$RUNS/jobs/${name:-$kind}-$(date +%Y%m%d-%H%M%S)-$$")}
set_options "$kind" "$folder" "$@"
options+=("${extra[@]}")

if [ $dry = yes ]; then
    echo "sbatch $(quoted "${options[@]}" "launch/$kind.sbatch" "$@")"
    exit 0
fi
made=() number='' path=$folder/code
while [ ! -e "$path" ] && [ ! -L "$path" ]; do
    made+=("$path")
    path=$(dirname "$path")
done
trap remove_made EXIT
snapshot "$PWD" "$folder/code"
[ -w "$folder" ] || fail "cannot write to $(quoted "$folder")"
submit "$folder" "$kind" "${options[@]}" -- "$@"
