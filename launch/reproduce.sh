#!/usr/bin/env bash
# All experiments of the paper from one command.
set -euo pipefail

usage() {
    cat <<'END'
usage: launch/reproduce.sh [--dry-run] [--suite S] [--seeds N] [--only RECIPE...]
                           [-- OPTION OF RFT.TRAIN...]
       launch/reproduce.sh --miniature [--suite S] [--seeds N] [--epochs N] [--out DIR]
                           [--processes N]

Submits every row of the paper's Tables 1 and 3 and every model of its Fig. 7 to SLURM, each job
behind those it needs, with the settings of launch/cluster.env. The report comes last. Again, once
no job of it waits or runs: what is done is skipped.

  --dry-run      print the jobs and submit none
  --seeds N      fine-tuning seeds, 3 if not given, as in the paper
  --suite S      post-2023: the method beside those that came later, on equal terms; paper if not
                 given
  --only ...     these recipes and what they build on; more: python -m rft.experiments --help
  -- ...         what follows goes to every training: -- --model.clip ViT-B-16 --precision bf16

With --miniature it runs all of it on the miniature world, on this machine, and prints the table
beside the paper's. The same command again goes on where it was stopped.

  --seeds N      fine-tuning seeds, 1 if not given
  --epochs N     fewer epochs than the recipes have, to try the path
  --out DIR      folder for images, shards, runs and report, miniature if not given
  --processes N  ranks of a training, 2 if not given
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
    # .venv is what make builds; an activated environment does as well
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
# shellcheck source=launch/cluster.env.example
source launch/cluster.env
# one that cannot start because another failed is taken off the queue
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
    # quoted for a shell by the plan itself
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
