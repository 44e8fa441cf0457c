# shellcheck shell=bash
# What the scripts of this folder share: functions only. A job runs in the project's folder, where
# launch/cluster.env is; its code comes from the folder it was submitted in, which is a copy.

CODE=(rft tools launch pyproject.toml) # what a job can need
LOCK_WAIT=1800                         # seconds; a lost node's processes may live on
PATIENCE=60                            # seconds in which SLURM may say why a step failed
LEAVE=120                              # seconds that the other nodes have when one has ended
CODE_BYTES=$((2 ** 28))                # of a copy of the code that is compared
# torchrun on a single node: its usual store would listen on every address, so ranks meet in a file
ALONE=(
    env PET_RDZV_BACKEND=c10d PET_RDZV_CONF=store_type=file TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --local_addr 127.0.0.1
)

# Words as a line for a shell.
quoted() {
    local word line=()
    for word; do
        [[ $word =~ ^[a-zA-Z0-9_./:=,%@+-]+$ ]] || word=${word@Q}
        line+=("$word")
    done
    echo "${line[*]}"
}

# The beginning of FILE as plain letters; nothing of a link, and without waiting for a FIFO: other users
# may write in the folder.
beginning_of() {
    dd if="$1" iflag=nofollow,nonblock bs=4096 count=1 status=none 2>/dev/null |
        LC_ALL=C tr --complement '[:print:]\n' '?'
}

# Fail unless a file can be renamed to NAME, as rft/storage/local.py does: a link is replaced, not followed.
require_replaceable() {
    if [ -e "$1" ] && [ ! -f "$1" ] && [ ! -L "$1" ]; then
        echo "error: $(quoted "$1") is not a regular file; remove it" >&2
        exit 2
    fi
}

# Fail if a log of FOLDER is a link: SLURM would append to what it leads to.
require_own_logs() {
    local log
    for log in "$1"/job-*.log; do
        if [ -L "$log" ]; then
            echo "error: $(quoted "$log") is a link, and no log is written through links; remove it" >&2
            exit 2
        fi
    done
}

# Fail if one of WORDS is a URL that may hold a password, token or signature: they are printed and kept
# in scripts. rft/storage/urls.py, which knows the names of secrets, cannot run before there is an environment,
# so all parameters but some are refused here, and hosts that are escaped or not ASCII.
refuse_credentials() {
    local word rest host name harmless=' versionid download id revision ref format ' LC_ALL=C
    for word; do
        [[ $word == *://* ]] || continue
        rest=${word#*://}
        host=${rest%%[/?#]*}
        # what Azure has before an @ is a container
        if [[ $host == *@* && ($host == *:*@* || ! $word =~ (abfss?|az)://) ]] ||
            [[ $host == *:* && ! $host =~ :[0-9]*$ && $rest == *@* ]] ||
            [[ $host =~ [^!-~]|% || $rest =~ ://[^/]*@ ]] ||
            [[ -z $host && $rest == *@* && $word != *file://* ]]; then
            refuse_credential "what may be a user or a password before its host"
        fi
        while [[ $rest =~ [?\&\;#]([^?\&\;#=]*)= ]]; do
            name=${BASH_REMATCH[1]}
            rest=${rest#*"${BASH_REMATCH[0]}"}
            [[ $harmless == *" ${name,,} "* ]] ||
                refuse_credential "the parameter $(quoted "$name"), which may be a credential"
        done
    done
}

refuse_credential() {
    echo "error: a URL here or in launch/cluster.env holds $1 and would be printed and recorded; leave it" \
        "out and export what its client reads (docs/storage.md#credentials)" >&2
    exit 2
}

# Value of the option NAME among WORDS, given as two words or with "="; nothing if it is not there.
option() {
    local name=$1 value=
    shift
    while (($#)); do
        case ${1/_/-} in
            "$name") value=${2:-} ;;
            "$name="*) value=${1#*=} ;;
        esac
        shift
    done
    echo "$value"
}

# Run folder of a training: of RECIPE with OPTIONS.
run_folder() {
    local recipe=$1 run seed
    shift
    run=$(option --run-dir "$@")
    run=${run:-$(option --run "$@")}
    seed=$(option --seed "$@")
    realpath -m "${run:-$RUNS/$recipe-seed${seed:-0}}"
}

# Names below FROM of the code's files as they are now, each ended by a zero byte.
code_files() {
    local name
    cd "$1" || return
    if [ -e .git ] && command -v git >/dev/null; then
        git ls-files -z --cached --others --exclude-standard -- "${CODE[@]}"
    else
        find "${CODE[@]}" -type f ! -name '*.pyc' -print0
    fi | while IFS= read -r -d '' name; do
        case $name in
            launch/cluster.env.example) ;;
            launch/*cluster.env*) continue ;; # settings and an editor's copies: secrets may be there
        esac
        # git lists what was deleted
        if [ -e "$name" ]; then printf '%s\0' "$name"; fi
    done
}

# The commit that FROM is, with -dirty if it was changed.
revision() {
    # as rft.storage.files.git_revision: a repository around the folder is another's, and a file that was
    # left behind in a checkout would name an old commit
    if [ -e "$1/.git" ] && git -C "$1" describe --always --dirty --abbrev=12 2>/dev/null; then
        return
    fi
    beginning_of "$1/REVISION" | head -n 1 | grep . || echo unknown
}

# Hash of all that a copy of the code in FOLDER holds, but Python's caches and what NFS keeps of deleted files. Fails if it is too large, or
# a part of it belongs to a different user, who can change it.
code_hash() (
    cd "$1" && [ -z "$(find . ! -uid "$EUID" -print -quit)" ] || exit 1
    find . \( -name __pycache__ -o -name '.nfs*' \) -prune -o -print0 | LC_ALL=C sort --zero-terminated |
        tar --create --no-recursion --null --files-from=- --format=gnu --numeric-owner --owner=0 \
            --group=0 --mode=0 --mtime=@0 2>/dev/null |
        head --bytes=$CODE_BYTES | sha256sum | cut -d ' ' -f 1
)

# File that shows that this user's scripts have made a copy of a HASH; it is empty. Not in the run
# folder, where its maker could have put one.
copy_record() {
    echo "${XDG_STATE_HOME:-${HOME:-}/.local/state}/rft/code/$1"
}

# Fail unless the copy TO was made by this user's scripts, or is the same as the copy FROM. A run
# folder may be someone else's, and its code would run as this user.
require_own_code() {
    local from=$1 to=$2 hash
    if [ ! -L "$to" ] && hash=$(code_hash "$to") && {
        [ -e "$(copy_record "$hash")" ] ||
            { [ -f "$from/REVISION" ] && [ "$hash" = "$(code_hash "$from")" ]; }
    }; then
        # Python runs a cache in place of its source; jobs make new ones
        find "$to" -name __pycache__ -prune -exec rm -rf {} +
        return
    fi
    echo "error: the code in $(quoted "$to") was not copied there by your launch/submit.sh, or was" \
        "changed, and would run as you; remove it to take the code in $(quoted "$from"), or, if you" \
        "trust that run folder, run its resubmit.sh" >&2
    exit 2
}

# Copy the code FROM a folder TO another, whole or not at all. A copy that is there stays: a run
# ends with the code that it began with.
snapshot() {
    local from=$1 to=$2 new now old record
    if [ -e "$to" ] || [ -L "$to" ]; then
        # a job that runs the copy itself
        if [ ! -L "$to" ] && [ "$from" -ef "$to" ]; then return; fi
        require_own_code "$from" "$to"
        now=$(revision "$from") old=$(revision "$to")
        if [ "$now" != "$old" ]; then
            echo "resumes with the code in $(quoted "$to") ($old); remove that folder to take the one" \
                "in $(quoted "$from") ($now)" >&2
        fi
        return
    fi
    mkdir -p "$(dirname "$to")"
    new=$(mktemp -d "$to.XXXXXX")
    code_files "$from" | tar --create --directory "$from" --null --files-from=- |
        tar --extract --no-same-permissions --directory "$new"
    revision "$from" >"$new/REVISION"
    # without a home that can be written only the same copy is known again
    if record=$(copy_record "$(code_hash "$new")") && mkdir -p "$(dirname "$record")"; then
        : >"$record" || true
    fi 2>/dev/null
    # others may write in it from here on, if the umask lets them
    chmod "$(umask -S)" "$new"
    mv -T "$new" "$to"
}

# Leave FOLDER/resubmit.sh, which submits a job of a KIND with sbatch's OPTIONS and, behind --, its
# arguments. What is given to it goes to sbatch as well.
leave_resubmit() {
    local folder=$1 kind=$2 options=() new
    shift 2
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    require_replaceable "$folder/resubmit.sh"
    new=$(mktemp "$folder/resubmit.sh.XXXXXX")
    cat >"$new" <<END
#!/usr/bin/env bash
# Submits this job again, with the code beside this file.
set -euo pipefail
cd $(quoted "$folder/code")
exec sbatch $(quoted "${options[@]}") "\$@" launch/$kind.sbatch $(quoted "$@")
END
    chmod "$(umask -S)" "$new"
    mv -fT "$new" "$folder/resubmit.sh"
}

# Options of sbatch, into the array `options`, for a job of a KIND that logs to FOLDER and gets
# ARGUMENTS; the current folder is the project's.
set_options() {
    local kind=$1 folder=$2 log="job-%j.log" gpus=$GPUS_PER_NODE
    shift 2
    case $kind in
        shard | sweep) log="job-%A-%a.log" ;;
    esac
    options=("--chdir=$PWD" "--job-name=rft-$kind" "--output=$folder/$log")
    # these need no accelerator, and no more cores than they can feed; their time is in the script
    if [ "$kind" = shard ] || [ "$kind ${1:-}" = "command python" ]; then
        options+=("${CPU_OPTIONS[@]}" "--cpus-per-task=$((CPUS_PER_NODE < 8 ? CPUS_PER_NODE : 8))")
        return
    fi
    options+=("${SBATCH_OPTIONS[@]}" "--time=$TIME" "--cpus-per-task=$CPUS_PER_NODE")
    if [ "$gpus" != 0 ]; then options+=("--gpus-per-node=$gpus"); fi
}

# First lines of every job.
begin() {
    # time can be up at once, and unheard the signal would be the end of this script
    asked=no
    trap 'asked=yes' USR1
    # shellcheck source=launch/cluster.env.example
    source launch/cluster.env
    # modules and virtual environments were not written for bash -u
    set +u
    setup
    set -u
    # of an array's jobs the last one has the array's number, which means all of them
    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-$SLURM_JOB_ID}
    attempt=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
}

# Let Python take rft from FOLDER, and not from the one that the job runs in.
use_code() {
    code=$1
    export PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
    echo "$(date '+%F %T') job $job, attempt ${SLURM_RESTART_COUNT:-0}, code $(revision "$code")"
}

# Run a command of one node; `torchrun` gets its ranks. Such a job skips what is done, so SLURM may
# kill and requeue it: signals are sent to steps, and this is none.
run_command() {
    refuse_credentials "$@"
    use_code "$SLURM_SUBMIT_DIR"
    if [ "$1" = torchrun ]; then
        shift
        set -- "${ALONE[@]}" --nproc_per_node "$PROCESSES_PER_NODE" \
            "${TORCHRUN_OPTIONS[@]}" "$@"
    fi
    echo "\$ $(quoted "$@")"
    "$@"
}

# Value of a FIELD that SLURM shows of this job; nothing if it does not show that field.
job_field() {
    local shown tries=0
    until shown=$(scontrol show job --oneliner "$job"); do
        tries=$((tries + 1))
        if ((tries == 30)); then return 1; fi
        sleep 10
    done
    case $shown in
        *" $1="*)
            shown=${shown#* "$1="}
            echo "${shown%% *}"
            ;;
    esac
}

# Whether SLURM has lost sight of one of this job's nodes.
misses_node() {
    sinfo --noheader --nodes="$SLURM_JOB_NODELIST" --format=%t | grep -q '[*]\|down\|fail'
}

# How far the run is.
progress() {
    beginning_of "$run/progress.json" || true
}

# Address by which SLURM reaches a NODE: its name need not resolve.
address_of() {
    local shown
    shown=$(scontrol show node --oneliner "$1" | grep -o ' NodeAddr=[^ ]*')
    echo "${shown#*=}"
}

# Run torchrun with these ARGUMENTS as one of several nodes' tasks.
torchrun_here() {
    # torch finds out by the host's name whether they meet here, which an address need not match
    exec torchrun --rdzv_conf "is_host=$((SLURM_NODEID == 0)),read_timeout=600" \
        --local_addr "$(address_of "$SLURMD_NODENAME")" "$@"
}

# Start torchrun on every node with these ARGUMENTS, in the background.
start_ranks() {
    local nodes=$SLURM_JOB_NUM_NODES head start
    if [ "$nodes" = 1 ]; then
        start=("${ALONE[@]}")
    else
        head=$(address_of "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)")
        # processes of an earlier attempt, on a node that was lost, must not be met
        # shellcheck disable=SC2016
        start=(
            bash -c 'source "$1/launch/job.sh" && shift && torchrun_here "$@"' torchrun "$code"
            --nnodes "$nodes" --rdzv_backend c10d --rdzv_id "$attempt" --rdzv_endpoint
            "$head:$((20000 + (SLURM_JOB_ID + 97 * ${SLURM_RESTART_COUNT:-0}) % 12000))"
        )
    fi
    # srun does not take over the cores that sbatch was given, and of the environment, where the job
    # was submitted without one, not what this script has put into it
    srun --export=ALL --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --wait=$LEAVE \
        "${start[@]}" --nproc_per_node "$PROCESSES_PER_NODE" "${TORCHRUN_OPTIONS[@]}" "$@" &
    ranks=$!
}

# Wait for the background process `ranks` and put its exit code into `status`. Traps run meanwhile,
# which end bash's wait.
wait_for_ranks() {
    while true; do
        if wait "$ranks"; then status=0; else status=$?; fi
        if ! kill -0 "$ranks" 2>/dev/null; then return; fi
    done
}

# Make the file that all ranks look for, in place of whatever file has that name.
ask_to_stop() {
    echo "$(date '+%F %T') asked to stop"
    mv -fT "$(mktemp "$stop.XXXXXX")" "$stop"
}

# Have SLURM start this job again, and wait for the end it brings: a script that ends by itself
# would be a job that has failed.
requeue() {
    local said tries=0
    echo "$(date '+%F %T') job $job is requeued: $1"
    # a busy controller does not answer at once, one that has answered "no" will not say "yes"
    until said=$(scontrol requeue "$job" 2>&1); do
        tries=$((tries + 1))
        if ((tries == 30)) || [[ $said == *[Dd]isabled* || $said == *denied* ]]; then
            echo "error: it cannot be: $said; go on with $run/resubmit.sh" >&2
            exit 1
        fi
        sleep 10
    done
    sleep infinity
}

# After an attempt that did not finish the run: go on in another one if that can help.
go_on() {
    local before=$1 waited=0 preempted
    while true; do
        # cancelled or ended by SLURM itself, which knows whether it starts again. A requeue would
        # bring even a cancelled job back
        if [ "$(job_field JobState)" != RUNNING ]; then
            echo "$(date '+%F %T') SLURM ends job $job; go on with $run/resubmit.sh if it does not"
            exit 1
        fi
        if [ -e "$stop" ]; then requeue "it was asked to stop"; fi
        # which clusters without preemption do not show
        preempted=$(job_field PreemptTime)
        if [ "${preempted:-None}" != None ]; then requeue "it is preempted"; fi
        if [ "$(progress)" != "$before" ]; then requeue "it failed, but had advanced"; fi
        # a lost node is found out by SLURM, after minutes, which then requeues
        if ((waited >= PATIENCE)) && ! misses_node; then break; fi
        sleep 5
        waited=$((waited + 5))
    done
    echo "error: $run failed without having advanced: it would again. What it said is above; then" \
        "go on with $run/resubmit.sh" >&2
    exit 1
}

# Train RECIPE with OPTIONS until the run is finished, in this attempt or a later one.
train() {
    local recipe=${1:?name a recipe; python -m rft.train --help lists them} before was_finished=no
    refuse_credentials "$@" "$DATA" "${TRAIN_OPTIONS[@]}"
    shift
    run=$(run_folder "$recipe" "$@")
    snapshot "$SLURM_SUBMIT_DIR" "$run/code"
    if [ ! -e "$run/resubmit.sh" ]; then
        set_options train "$run"
        options+=("--partition=$SLURM_JOB_PARTITION" "--nodes=$SLURM_JOB_NUM_NODES")
        leave_resubmit "$run" train "${options[@]}" "--time=$(job_field TimeLimit)" -- \
            "$recipe" "$@"
    fi
    use_code "$run/code"

    stop=$run/stop-$attempt
    rm -f "$stop" # the name is this attempt's alone
    before=$(progress)
    if [ -e "$run/training.json" ]; then was_finished=yes; fi
    local words=(--run-dir "$run" --cluster.stop-file "$stop" --cluster.lock-wait "$LOCK_WAIT")
    if [ -z "$(option --data "$@")" ]; then words+=(--data "$DATA"); fi
    # a node without its GPUs would train on the CPU, and the others wait for it
    if [ "$GPUS_PER_NODE" != 0 ]; then words+=(--device cuda); fi
    # what SLURM leaves between a preemption's first signal and the kill is for the checkpoint
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$LEAVE
    trap ask_to_stop USR1 TERM
    if [ "$asked" = yes ]; then ask_to_stop; fi
    start_ranks -m rft.train "$recipe" "${words[@]}" "${TRAIN_OPTIONS[@]}" "$@"
    wait_for_ranks
    # time can be up, or a second signal come, while it is found out what to do
    trap - TERM
    trap '' USR1

    # a rank on another node may have written that file, and this one's file system not know yet;
    # ranks that stopped before the end do not exit with 0
    if [ -e "$run/training.json" ] || [ "$status" = 0 ]; then
        rm -f "$run"/stop-[0-9]*-* || true
        # a rank can fail after all work is done; a finished run can be refused
        if [ $was_finished = yes ]; then exit "$status"; fi
        exit 0
    fi
    go_on "$before"
}
