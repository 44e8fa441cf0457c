#!/usr/bin/env bash
# A real SLURM cluster in a box: slurmctld, munge and two slurmd that share this machine. Needs root
# and the Debian packages slurmctld, slurmd, slurm-client and munge.
#   cluster.sh run DIR            start it and keep running; it is up when DIR/up exists. With
#                                 PREEMPTION=no in the environment, no job preempts another
#   cluster.sh in DIR COMMAND...  run a command inside, where sbatch finds the cluster
#   cluster.sh lose DIR NODE      kill all processes of a node, like a power failure
#   cluster.sh regain DIR NODE    restart the node
# It has its own host name, network (no port of it is seen outside) and process numbers: when `run`
# ends, however it ends, the kernel kills every daemon and every job with it.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

configuration() {
    local cores type=partition_prio mode=REQUEUE
    cores=$(getconf _NPROCESSORS_ONLN)
    if [ "${PREEMPTION:-yes}" = no ]; then type=none mode=OFF; fi
    cat <<END
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$1/munge/sock,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$1/log/jobcomp.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
MpiDefault=none
ReturnToService=2
SlurmdTimeout=5
KillWait=5
PreemptType=preempt/$type
PreemptMode=$mode
StateSaveLocation=$1/state
SlurmdSpoolDir=$1/spool/%n
SlurmctldPidFile=$1/run/slurmctld.pid
SlurmdPidFile=$1/run/slurmd-%n.pid
SlurmctldLogFile=$1/log/slurmctld.log
SlurmdLogFile=$1/log/slurmd-%n.log
NodeName=node1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=6821 CPUs=$cores CoresPerSocket=$cores
NodeName=node2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=6822 CPUs=$cores CoresPerSocket=$cores
PartitionName=low Nodes=ALL Default=YES MaxTime=1-0 PriorityTier=1 PreemptMode=$mode GraceTime=60
PartitionName=high Nodes=ALL MaxTime=1-0 PriorityTier=10 PreemptMode=OFF
END
}

# The first process of the box, started only by this script.
inside() {
    local dir=$1
    hostname localhost
    ip link set lo up
    # name look-ups fail where there is no other address than the loopback's
    ip address add 10.99.0.1/32 dev lo
    # its folder may be one that only root can enter, and munged would not have that
    munged --force --foreground --socket="$dir/munge/sock" --key-file="$dir/munge/key" \
        --log-file="$dir/log/munged.log" --pid-file="$dir/munge/pid" \
        --seed-file="$dir/munge/seed" &
    until [ -S "$dir/munge/sock" ]; do
        kill -0 $!
        sleep 0.05
    done
    slurmctld -D -c &
    for node in node1 node2; do slurmd -D -N $node & done
    until [ "$(timeout 5 sinfo --noheader --Node --states=idle --partition=low | wc -l)" = 2 ]; do
        sleep 0.1
    done
    echo $$ >"$dir/up"
    # a killed slurmd is part of the tests, so the box outlives it; waiting also reaps orphans
    while true; do
        sleep 1000 &
        wait $!
    done
}

# Kill a node's slurmd, its jobs' processes and the slurmstepd above them; run inside the box.
kill_node() {
    local process parent victims
    victims=("$(cat "$dir/run/slurmd-$1.pid")")
    for process in /proc/[0-9]*; do
        if grep -qzx "SLURMD_NODENAME=$1" "$process/environ" 2>/dev/null; then
            victims+=("${process#/proc/}")
            parent=$(awk '/^PPid:/ { print $2 }' "$process/status")
            if [[ $(cat "/proc/$parent/comm") == slurmstepd* ]]; then victims+=("$parent"); fi
        fi
    done
    kill -KILL "${victims[@]}" 2>/dev/null || true
}

verb=${1:?run, in, lose or regain}
dir=$(realpath -m "${2:?name a folder}")
shift 2
export SLURM_CONF=$dir/slurm.conf
case $verb in
    run)
        umask 022
        mkdir -p "$dir"/{state,spool/node1,spool/node2,log,run,munge}
        chmod 711 "$dir/munge"
        head -c 1024 /dev/urandom >"$dir/munge/key"
        chmod 400 "$dir/munge/key"
        configuration "$dir" >"$dir/slurm.conf"
        rm -f "$dir/up"
        echo $$ >"$dir/run/outside"
        exec unshare --net --uts --pid --mount-proc --fork --kill-child \
            "$(realpath "$0")" inside "$dir"
        ;;
    inside) inside "$dir" ;;
    lose) exec "$0" in "$dir" "$(realpath "$0")" kill-node "$dir" "$1" ;;
    kill-node) kill_node "$1" ;;
    regain) exec "$0" in "$dir" slurmd -N "$1" ;;
    in)
        # unshare has one child, the first process of the box
        outside=$(cat "$dir/run/outside")
        box=$(cut -d ' ' -f 1 "/proc/$outside/task/$outside/children")
        exec nsenter --target "$box" --net --uts --pid --mount --wd="$PWD" "$@"
        ;;
    *)
        echo "error: unknown command $verb" >&2
        exit 2
        ;;
esac
