#!/usr/bin/env bash
# Run all experiments of the paper with one command.
set -euo pipefail

usage() {
    cat <<'END'
usage: launch/reproduce.sh [--dry-run] [--suite S] [--seeds N] [--only RECIPE...]
                           [-- OPTION OF RFT.TRAIN...]
       launch/reproduce.sh --miniature [--suite S] [--seeds N] [--epochs N] [--out DIR]
                           [--processes N]

Submits every row of the paper's Tables 1 and 3 and every model of its Fig. 7 to SLURM, with the
settings of launch/cluster.env. Each job waits for those it needs; the report comes last. To resume,
rerun the command when none of its jobs waits or runs; finished work is skipped.

  --dry-run      print the jobs without submitting them
  --seeds N      fine-tuning seeds (default: 3, as in the paper)
  --suite S      paper (default), or post-2023: the method and later ones on equal terms
  --only ...     only these recipes and their prerequisites; see python -m rft.experiments --help
  -- ...         options for every training, e.g. -- --model.clip ViT-B-16 --precision bf16

With --miniature, runs everything on this machine, on the miniature world, and prints the table
beside the paper's. The same command resumes an interrupted run.

  --seeds N      fine-tuning seeds (default: 1)
  --epochs N     train for fewer epochs than the recipes, to test the pipeline
  --out DIR      folder for images, shards, runs and report (default: miniature)
  --processes N  ranks per training (default: 2)
END
}

miniature=no dry=no
options=()
while (($#)); do
    case $1 in
        --miniature) miniature=yes ;;
        --dry-run) dry=yes ;;
        -h | --help)
            usage
            exit 0
            ;;
        --)
            options+=("$@")
            break
            ;;
        *) options+=("$1") ;;
    esac
    shift
done

root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
if [ $miniature = yes ]; then
    [ $dry = no ] || options+=(--dry-run)
    # make builds .venv; without it, use the active environment
    python=$root/.venv/bin/python
    [ -x "$python" ] || python=python
    exec "$python" -m rft.demo paper "${options[@]}"
fi

cd "$root"
if [ ! -e launch/cluster.env ]; then
    echo "error: copy launch/cluster.env.example to launch/cluster.env and edit it; --miniature" \
        "needs no cluster" >&2
    exit 2
fi
# shellcheck source=launch/job.sh
source launch/job.sh
load_settings
# remove a job from the queue if a job that it depends on has failed
submit=(launch/submit.sh --kill-on-invalid-dep=yes)
[ $dry = no ] || submit+=(--dry-run)

plan=$(
    set +u
    setup >&2
    set -u
    python -m rft.experiments --runs "$RUNS" --data "$DATA" --lines "${options[@]}"
)
declare -A jobs=()
while IFS= read -r line; do
    name=${line%%$'\t'*} rest=${line#*$'\t'}
    needed=${rest%%$'\t'*}
    # the plan has quoted the command for a shell
    command=()
    eval "command=(${rest#*$'\t'})"
    waits=()
    if [ -n "$needed" ]; then
        numbers=
        for other in ${needed//,/ }; do numbers+=:${jobs[$other]}; done
        waits=("--dependency=afterok$numbers")
    fi
    if [ "${command[*]:0:3}" = "torchrun -m rft.train" ]; then
        what=(train "${command[@]:3}")
    else
        what=(command "${command[@]}")
    fi
    if [ $dry = yes ]; then
        jobs[$name]=JOB-OF-$name
        "${submit[@]}" "--job-name=$name" "${waits[@]}" "${what[@]}"
    else
        jobs[$name]=$("${submit[@]}" "--job-name=$name" "${waits[@]}" "${what[@]}")
    fi
done <<<"$plan"
[ $dry = no ] || exit 0
echo "submitted ${#jobs[@]} jobs; watch them with squeue --me, trainings with" \
    "tail $RUNS/*/metrics.jsonl; the report will be ${RUNS%/}-report/index.html"
