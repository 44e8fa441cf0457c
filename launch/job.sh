# shellcheck shell=bash
# Functions shared by the scripts in this folder. A job runs in the project folder, which has
# launch/cluster.env, and takes its code from the submission folder, which is a copy.

CODE=(rft tools launch pyproject.toml) # everything a job may need
LOCK_WAIT=1800                         # seconds; processes of a lost node may survive
PATIENCE=60                            # seconds for SLURM to report why a step failed
LEAVE=120                              # seconds until the other nodes must end after the first
CODE_BYTES=$((2 ** 28))                # hashed at most, when copies of the code are compared
# functions that a resubmission needs
SUBMITTING=(fail quoted option require_own_logs require_replaceable jobs_of submit leave_resubmit)
# torchrun on a single node. Its default store listens on all addresses, so ranks rendezvous in a file
ALONE=(
    env PET_RDZV_BACKEND=c10d PET_RDZV_CONF=store_type=file TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --local_addr 127.0.0.1
)

fail() {
    echo "error: $*" >&2
    exit 2
}

# Quote words as one shell line.
quoted() {
    local word line=()
    for word; do
        [[ $word =~ ^[a-zA-Z0-9_./:=,%@+-]+$ ]] || word=${word@Q}
        line+=("$word")
    done
    echo "${line[*]}"
}

# Print the beginning of FILE as plain ASCII. Other users may write to the folder, so links are not
# followed and FIFOs do not block.
beginning_of() {
    dd if="$1" iflag=nofollow,nonblock bs=4096 count=1 status=none 2>/dev/null |
        LC_ALL=C tr --complement '[:print:]\n' '?'
}

# Fail unless a file can be renamed to NAME, as in rft/storage/local.py: a link is replaced, not followed.
require_replaceable() {
    if [ -e "$1" ] && [ ! -f "$1" ] && [ ! -L "$1" ]; then
        fail "$(quoted "$1") is not a regular file; remove it"
    fi
}

# Fail if a log in FOLDER is a link: SLURM would append to its target.
require_own_logs() {
    local log
    for log in "$1"/job-*.log; do
        if [ -L "$log" ]; then
            fail "$(quoted "$log") is a link, and logs are not written through links; remove it"
        fi
    done
}

# Fail if one of WORDS is a URL that may contain a password, token or signature: arguments are printed and
# kept in scripts. rft/storage/urls.py, which lists the names of secrets, cannot run before the environment
# is set up. So only a few harmless parameters pass here, and no host that is escaped or not ASCII.
refuse_credentials() {
    local word rest host name harmless=' versionid download id revision ref format ' LC_ALL=C
    for word; do
        [[ $word == *://* ]] || continue
        rest=${word#*://}
        host=${rest%%[/?#]*}
        # in Azure URLs, the part before an @ is a container
        if [[ $host == *@* && ($host == *:*@* || ! $word =~ (abfss?|az)://) ]] ||
            [[ $host == *:* && ! $host =~ :[0-9]*$ && $rest == *@* ]] ||
            [[ $host =~ [^!-~]|% || $rest =~ ://[^/]*@ ]] ||
            [[ -z $host && $rest == *@* && $word != *file://* ]]; then
            refuse_credential "a possible user or password before its host"
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
    fail "a URL here or in launch/cluster.env contains $1 and would be printed and recorded;" \
        "remove it and export the variables that its client reads (docs/storage.md#credentials)"
}

# Fail unless setting NAME has a value that matches PATTERN, which the words after it describe.
require_setting() {
    local name=$1 pattern=$2
    shift 2
    [[ ${!name:-} =~ ^($pattern)$ ]] || fail "launch/cluster.env: $name must be $*"
}

# A function of its own: what `declare` makes local to it is absent when the settings are checked.
source_settings() {
    # shellcheck source=launch/cluster.env.example
    source launch/cluster.env
}

# Load and check launch/cluster.env. Values are not printed, because they may be secret.
load_settings() {
    local name word words
    [ -e launch/cluster.env ] || fail "copy launch/cluster.env.example to launch/cluster.env and edit it"
    source_settings
    require_setting TIME '[0-9]+(:[0-9]+){0,2}|[0-9]+-[0-9]+(:[0-9]+){0,2}|[Ii][Nn][Ff][Ii][Nn][Ii][Tt][Ee]|[Uu][Nn][Ll][Ii][Mm][Ii][Tt][Ee][Dd]' \
        "the time limit of a job: minutes, hours:minutes:seconds (24:00:00) or days-hours (2-12)"
    require_setting GPUS_PER_NODE '([a-zA-Z][^:]*:)?(0|[1-9][0-9]*)' "a number; 0 for nodes without GPUs"
    require_setting CPUS_PER_NODE '[1-9][0-9]*' "a number of at least 1"
    require_setting PROCESSES_PER_NODE '[1-9][0-9]*' \
        "the number of ranks per node, at least 1, also with GPUS_PER_NODE=0"
    # without data, rft.train would use its miniature world
    require_setting DATA '/.*|[^/]+://.+' "an absolute path or a URL"
    require_setting RUNS '/.*' "an absolute path"
    for name in SBATCH_OPTIONS CPU_OPTIONS TRAIN_OPTIONS TORCHRUN_OPTIONS; do
        [[ $(declare -p "$name" 2>/dev/null) == "declare -a"* ]] ||
            fail "launch/cluster.env: $name must be an array, such as $name=(--option value) or $name=()," \
                "without declare"
        words="${name}[@]"
        for word in "${!words}"; do
            [[ ! $word =~ ^-[^=[:space:]]*[[:space:]] ]] ||
                fail "launch/cluster.env: $name has an option and its value in one pair of quotes;" \
                    "make them two words"
        done
    done
    [ "$(type -t setup)" = function ] ||
        fail "launch/cluster.env: the function setup is missing; copy it from launch/cluster.env.example"
}

# Print the value of option NAME among WORDS, as two words or with "="; nothing without the option.
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

# Print the run folder of a training of RECIPE with OPTIONS.
run_folder() {
    local recipe=$1 run seed
    shift
    run=$(option --run-dir "$@")
    run=${run:-$(option --run "$@")}
    seed=$(option --seed "$@")
    realpath -m "${run:-$RUNS/$recipe-seed${seed:-0}}"
}

# List the current code files, relative to FROM, separated by zero bytes.
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
            launch/*cluster.env*) continue ;; # settings and editor backups, which may hold secrets
        esac
        # git also lists deleted files
        if [ -e "$name" ]; then printf '%s\0' "$name"; fi
    done
}

# Print the commit of FROM, with -dirty if the files have changed.
revision() {
    # as in rft.storage.files.git_revision: an enclosing repository is unrelated, and a stale REVISION
    # file in a checkout would name an old commit
    if [ -e "$1/.git" ] && git -C "$1" describe --always --dirty --abbrev=12 2>/dev/null; then
        return
    fi
    beginning_of "$1/REVISION" | head -n 1 | grep . || echo unknown
}

# Print a hash of a copy of the code in FOLDER, without Python's caches and NFS's remains of deleted files.
# Fail if the copy is too large, or if a file belongs to a different user, who could change it.
code_hash() (
    cd "$1" && [ -z "$(find . ! -uid "$EUID" -print -quit)" ] || exit 1
    find . \( -name __pycache__ -o -name '.nfs*' \) -prune -o -print0 | LC_ALL=C sort --zero-terminated |
        tar --create --no-recursion --null --files-from=- --format=gnu --numeric-owner --owner=0 \
            --group=0 --mode=0 --mtime=@0 2>/dev/null |
        head --bytes=$CODE_BYTES | sha256sum | cut -d ' ' -f 1
)

# Print the name of an empty file, which records that this user's scripts made a copy with HASH. It is
# outside the run folder, whose owner could forge it.
copy_record() {
    echo "${XDG_STATE_HOME:-${HOME:-}/.local/state}/rft/code/$1"
}

# Fail unless the copy TO was made by this user's scripts or equals the copy FROM. The run folder may
# belong to a different user, and its code would run as this one.
require_own_code() {
    local from=$1 to=$2 hash
    if [ ! -L "$to" ] && hash=$(code_hash "$to") && {
        [ -e "$(copy_record "$hash")" ] ||
            { [ -f "$from/REVISION" ] && [ "$hash" = "$(code_hash "$from")" ]; }
    }; then
        # Python would run a cached file in place of its source; jobs write new caches
        find "$to" -name __pycache__ -prune -exec rm -rf {} +
        return
    fi
    fail "the code in $(quoted "$to") was not copied there by your launch/submit.sh, or has" \
        "changed since, and would run as you; remove it to use the code in $(quoted "$from"), or, if" \
        "you trust that run folder, run its resubmit-JOB.sh"
}

# Copy the code FROM one folder TO another, atomically. An existing copy stays, so a run ends with the
# code that it started with.
snapshot() {
    local from=$1 to=$2 new now old record
    if [ -e "$to" ] || [ -L "$to" ]; then
        # the job runs from the copy itself
        if [ ! -L "$to" ] && [ "$from" -ef "$to" ]; then return; fi
        require_own_code "$from" "$to"
        now=$(revision "$from") old=$(revision "$to")
        if [ "$now" != "$old" ]; then
            echo "resumes with the code in $(quoted "$to") ($old); remove that folder to use the code" \
                "in $(quoted "$from") ($now)" >&2
        fi
        return
    fi
    mkdir -p "$(dirname "$to")"
    new=$(mktemp -d "$to.XXXXXX")
    code_files "$from" | tar --create --directory "$from" --null --files-from=- |
        tar --extract --no-same-permissions --directory "$new"
    revision "$from" >"$new/REVISION"
    # without a writable home there is no record, and only an identical copy is accepted later
    if record=$(copy_record "$(code_hash "$new")") && mkdir -p "$(dirname "$record")"; then
        : >"$record" || true
    fi 2>/dev/null
    # from here on other users may write to it, if the umask permits
    chmod "$(umask -S)" "$new"
    mv -T "$new" "$to"
}

# Print the numbers of this user's jobs, waiting or running, that log to FOLDER.
jobs_of() {
    { timeout 10 squeue --noheader --user="$EUID" --Format=JobID:20,STDOUT:4000 2>/dev/null || true; } |
        while read -r number output; do
            if [[ $output == "$1"/job-* ]]; then echo "$number"; fi
        done | sort --unique | paste --serial --delimiters=' '
}

# Submit a job of KIND, with the code in FOLDER, by sbatch OPTIONS and, after --, its arguments. Print its
# number, which is also stored in `number`, and leave a script that submits it again.
submit() {
    local folder=$1 kind=$2 options=() before name log
    shift 2
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    require_own_logs "$folder"
    before=$(jobs_of "$folder")
    [ -z "$before" ] ||
        echo "warning: $(quoted "$folder") already has jobs waiting or running: $before" >&2
    if ! number=$(cd "$folder/code" && sbatch --parsable "${options[@]}" "launch/$kind.sbatch" "$@"); then
        # sbatch also fails if SLURM took the job and its answer was lost
        number=$(jobs_of "$folder")
        [ "$number" = "$before" ] ||
            fail "sbatch failed, but $(quoted "$folder") has jobs: $number; look at squeue --me"
        fail "sbatch failed, no job was submitted; $(quoted "$folder") is unchanged"
    fi
    number=${number%%;*}
    log=$(option --output "${options[@]}")
    name=${log##*/}
    name=${name//%[jA]/$number}
    echo "submitted $kind as job $number; log: $(quoted "${log%/*}")/${name//%a/*}" >&2
    echo "$number"
    leave_resubmit "$folder" "$number" "$kind" "${options[@]}" -- "$@"
}

# Write FOLDER/resubmit-JOB.sh, which submits JOB of KIND again with sbatch OPTIONS and, after --, its
# arguments. Arguments of that script go to sbatch as well. It has its own copy of these functions, because
# the code in FOLDER may be older.
leave_resubmit() {
    local folder=$1 job=$2 kind=$3 options=() new script=$1/resubmit-$2.sh
    shift 3
    while [ "$1" != -- ]; do
        # the jobs to wait for will no longer exist
        [[ $1 == --@(dependency|kill-on-invalid-dep)=* ]] || options+=("$1")
        shift
    done
    shift
    require_replaceable "$script"
    new=$(mktemp "$script.XXXXXX")
    cat >"$new" <<END
#!/usr/bin/env bash
# Submits job $job again, with the code beside this file.
set -euo pipefail
$(declare -f "${SUBMITTING[@]}")
SUBMITTING=(${SUBMITTING[*]})
cd $(quoted "$folder/code")
submit $(quoted "$folder" "$kind" "${options[@]}") "\$@" -- $(quoted "$@")
END
    chmod "$(umask -S)" "$new"
    mv -fT "$new" "$script"
}

# Set the array `options` to the sbatch options for a job of KIND with ARGUMENTS that logs to FOLDER. Run it
# in the project folder.
set_options() {
    local kind=$1 folder=$2 gpus=$GPUS_PER_NODE log="job-%j.log"
    shift 2
    case $kind in
        shard | sweep) log="job-%A-%a.log" ;;
    esac
    options=("--chdir=$PWD" "--job-name=rft-$kind" "--output=$folder/$log")
    # these need no accelerator and use few cores; the script sets their time limit
    if [ "$kind" = shard ] || [ "$kind ${1:-}" = "command python" ]; then
        options+=("${CPU_OPTIONS[@]}" "--cpus-per-task=$((CPUS_PER_NODE < 8 ? CPUS_PER_NODE : 8))")
        return
    fi
    options+=("${SBATCH_OPTIONS[@]}" "--time=$TIME" "--cpus-per-task=$CPUS_PER_NODE")
    if [ "$gpus" != 0 ]; then options+=("--gpus-per-node=$gpus"); fi
}

# Start of every job: load the settings and set up the environment.
begin() {
    # the signal may arrive at once, and without a trap it would kill this script
    asked=no
    trap 'asked=yes' USR1
    # the last job of an array has the array's own number, which would address all of its jobs
    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-$SLURM_JOB_ID}
    attempt=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
    echo "$(date '+%F %T') job $job, attempt ${SLURM_RESTART_COUNT:-0}"
    load_settings
    # module and virtualenv scripts often fail under bash -u
    set +u
    trap 'echo "error: setup in launch/cluster.env failed" >&2' EXIT
    setup
    trap - EXIT
    set -u
}

# Make Python import rft from FOLDER instead of the job's working folder.
use_code() {
    code=$1
    export PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
    echo "code $(revision "$code")"
}

# Run a command on one node; `torchrun` gets its ranks. These jobs skip finished work, so SLURM can kill
# and requeue them. SLURM signals job steps, and this command is not one.
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

# Print a FIELD of this job as SLURM shows it; nothing without that field.
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

# Print how far the run is, to compare with a later call.
progress() {
    beginning_of "$run/progress.json" || true
}

# Whether the run has advanced since it was at BEFORE, by this job: the stop file in the command of the
# training that last held the run folder names its job.
advanced() {
    [ "$(progress)" != "$1" ] &&
        [[ $(beginning_of "$run/provenance.json") == *"/stop-$SLURM_JOB_ID-"* ]]
}

# Print the address at which SLURM reaches NODE, because its name may not resolve.
address_of() {
    local shown
    shown=$(scontrol show node --oneliner "$1" | grep -o ' NodeAddr=[^ ]*')
    echo "${shown#*=}"
}

# Run torchrun with ARGUMENTS as the task of one of several nodes.
torchrun_here() {
    # torch decides by host name whether this node hosts the rendezvous, which an address may not match
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
        # the port and id differ per attempt: surviving processes of a lost node must not join
        # shellcheck disable=SC2016
        start=(
            bash -c 'source "$1/launch/job.sh" && shift && torchrun_here "$@"' torchrun "$code"
            --nnodes "$nodes" --rdzv_backend c10d --rdzv_id "$attempt" --rdzv_endpoint
            "$head:$((20000 + (SLURM_JOB_ID + 97 * ${SLURM_RESTART_COUNT:-0}) % 12000))"
        )
    fi
    # srun does not inherit the cores given to sbatch, nor, if the job was submitted without an
    # environment, the variables that this script has exported
    srun --export=ALL --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --wait=$LEAVE \
        "${start[@]}" --nproc_per_node "$PROCESSES_PER_NODE" "${TORCHRUN_OPTIONS[@]}" "$@" &
    ranks=$!
}

# Wait for the background process `ranks` and store its exit code in `status`. A trap that runs
# meanwhile ends bash's wait, hence the loop.
wait_for_ranks() {
    while true; do
        if wait "$ranks"; then status=0; else status=$?; fi
        if ! kill -0 "$ranks" 2>/dev/null; then return; fi
    done
}

# Create the stop file that all ranks check, replacing any file of that name.
ask_to_stop() {
    echo "$(date '+%F %T') stop requested; the ranks exit with code 75, which torchrun reports as an error"
    mv -fT "$(mktemp "$stop.XXXXXX")" "$stop"
}

# Requeue this job, then wait to be killed by SLURM: if the script ended by itself, the job would
# count as failed.
requeue() {
    local said tries=0
    echo "$(date '+%F %T') job $job requeued: $1"
    # retry while the controller is busy; a refusal is final
    until said=$(scontrol requeue "$job" 2>&1); do
        tries=$((tries + 1))
        if ((tries == 30)) || [[ $said == *[Dd]isabled* || $said == *denied* ]]; then
            echo "error: the requeue failed: $said; resume with $(quoted "$run/resubmit-$job.sh")" >&2
            exit 1
        fi
        sleep 10
    done
    sleep infinity
}

# After an attempt that did not finish the run: requeue the job if a retry can help, else fail.
requeue_or_fail() {
    local before=$1 waited=0 preempted again
    again=$(quoted "$run/resubmit-$job.sh")
    # a script on a lost node would be lost too
    if [ "$SLURM_JOB_NUM_NODES" = 1 ]; then PATIENCE=0; fi
    while true; do
        # SLURM itself is ending the job and decides whether it restarts. A requeue would revive
        # even a cancelled job
        if [ "$(job_field JobState)" != RUNNING ]; then
            echo "$(date '+%F %T') SLURM is ending job $job; if it is not requeued, resume with $again"
            exit 1
        fi
        if [ -e "$stop" ]; then requeue "stop requested"; fi
        # clusters without preemption do not show this field
        preempted=$(job_field PreemptTime)
        if [ "${preempted:-None}" != None ]; then requeue "preempted"; fi
        if advanced "$before"; then requeue "failed after making progress"; fi
        # SLURM takes minutes to notice a lost node, then requeues by itself
        if ((waited >= PATIENCE)) && ! misses_node; then break; fi
        if ((waited == 0)); then
            echo "$(date '+%F %T') failed without progress; waiting in case SLURM reports a lost node"
        fi
        sleep 5
        waited=$((waited + 5))
    done
    echo "error: $(quoted "$run") failed and this job made no progress; not requeued. Fix the error above;" \
        "$again repeats this job with the same options, launch/submit.sh takes others" >&2
    exit 1
}

# Train RECIPE with OPTIONS until the run is finished, in this attempt or a later one.
train() {
    local recipe=${1:?name a recipe; python -m rft.train --help lists them} before was_finished=no word own=()
    refuse_credentials "$@" "$DATA" "${TRAIN_OPTIONS[@]}"
    shift
    run=$(run_folder "$recipe" "$@")
    snapshot "$SLURM_SUBMIT_DIR" "$run/code"
    # `submit` writes it for its own trainings, not for tasks of a sweep
    if [ ! -e "$run/resubmit-$job.sh" ] && [ ! "$SLURM_SUBMIT_DIR" -ef "$run/code" ]; then
        TIME=$(job_field TimeLimit)
        set_options train "$run"
        for word in "${options[@]}"; do
            [[ $word == --@(partition|nodes)=* ]] || own+=("$word")
        done
        leave_resubmit "$run" "$job" train "${own[@]}" "--partition=$SLURM_JOB_PARTITION" \
            "--nodes=$SLURM_JOB_NUM_NODES" -- "$recipe" "$@"
    fi
    use_code "$run/code"

    stop=$run/stop-$attempt
    rm -f "$stop" # only this attempt uses the name
    before=$(progress)
    if [ -e "$run/training.json" ]; then was_finished=yes; fi
    local words=(--run-dir "$run" --cluster.stop-file "$stop" --cluster.lock-wait "$LOCK_WAIT")
    if [ -z "$(option --data "$@")" ]; then words+=(--data "$DATA"); fi
    # a node whose GPUs are missing would train on the CPU and slow down the others
    if [ "$GPUS_PER_NODE" != 0 ]; then words+=(--device cuda); fi
    # use the grace time between a preemption's first signal and the kill for the checkpoint
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$LEAVE
    trap ask_to_stop USR1 TERM
    if [ "$asked" = yes ]; then ask_to_stop; fi
    start_ranks -m rft.train "$recipe" "${words[@]}" "${TRAIN_OPTIONS[@]}" "$@"
    wait_for_ranks
    # the time limit or a second signal may arrive while the outcome is examined
    trap - TERM
    trap '' USR1

    # a rank on a different node may have written this file, and the local file system may not show it
    # yet. Ranks that stopped early do not exit with 0
    if [ -e "$run/training.json" ] || [ "$status" = 0 ]; then
        rm -f "$run"/stop-[0-9]*-* || true
        # a rank may fail after all work is done, and a run finished earlier may be refused
        if [ $was_finished = yes ]; then exit "$status"; fi
        exit 0
    fi
    requeue_or_fail "$before"
}
