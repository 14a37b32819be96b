#!/usr/bin/env bash
# A real Slurm with two nodes on this machine, for tests and for trying job scripts:
#   bash scripts/local_slurm.sh up        # start it and print the `export` that clients need
#   bash scripts/local_slurm.sh status
#   bash scripts/local_slurm.sh down      # cancel its jobs, stop its daemons, remove its files
# Requires root on Debian or Ubuntu; `up` installs slurm-wlm and munge if they are missing. Files are in
# MAML_LOCAL_SLURM (default: maml-local-slurm in TMPDIR); three ports are used on the loopback interface,
# starting at MAML_LOCAL_SLURM_PORT (default: 17000). Nodes n1 and n2 claim 16 CPUs and 2 GPUs each.
# A job in the partition `urgent` preempts jobs in `batch`, which receive SIGTERM and are requeued after a
# grace time of 30 s.
set -euo pipefail
state=$(realpath -m "${MAML_LOCAL_SLURM:-${TMPDIR:-/tmp}/maml-local-slurm}")
port=${MAML_LOCAL_SLURM_PORT:-17000}
export SLURM_CONF=$state/slurm.conf

fail() {
    echo "local_slurm.sh: error: $*" >&2
    exit 1
}

up() {
    [ "$(id -u)" = 0 ] || fail "Slurm's daemons need root; run this script as root"
    [ ! -e "$state" ] || fail "$state exists: Slurm is running, or remove its remains with: bash scripts/local_slurm.sh down"
    ((${#state} < 80)) || fail "MAML_LOCAL_SLURM is $state; the path of a socket must be below 80 characters"
    [[ $port =~ ^[0-9]+$ ]] || fail "MAML_LOCAL_SLURM_PORT is $port; it must be a number"
    local each
    for each in "$port" $((port + 1)) $((port + 2)); do
        ! (: >"/dev/tcp/127.0.0.1/$each") 2>/dev/null ||
            fail "port $each is in use; set MAML_LOCAL_SLURM_PORT to the first of three free ports"
    done
    install_packages
    mkdir -p "$state"/{controller,spool-n1,spool-n2} || fail "MAML_LOCAL_SLURM: $state cannot be created"
    trap 'take_down; exit 1' ERR INT TERM
    choose_host
    configure

    # A daemon started in the foreground keeps its pid.
    # --force: munged otherwise refuses a socket that other users cannot reach, which is intended here.
    start munged --foreground --force --socket="$state/munge.socket" --key-file="$state/munge.key" \
        --pid-file="$state/munged.pid" --seed-file="$state/munged.seed" \
        --log-file="$state/munged.log" --num-threads=2
    wait_until 20 "munged" credentials_work
    start slurmctld -D
    wait_until 20 "slurmctld" controller_is_up
    start slurmd -D -N n1
    start slurmd -D -N n2
    wait_until 30 "the nodes" idle
    trap - ERR INT TERM
    echo "export SLURM_CONF=$SLURM_CONF"
}

install_packages() {
    if command -v slurmctld slurmd munged munge srun >/dev/null; then return; fi
    command -v apt-get >/dev/null || fail "slurm-wlm and munge are not installed, and there is no apt-get to install them"
    # Debian starts the services it installs; these must not start.
    local policy=/usr/sbin/policy-rc.d own=0
    if [ ! -e "$policy" ]; then
        own=1
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
    fi
    local log done=1
    log=$(mktemp)
    (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
        --no-install-recommends slurm-wlm munge) </dev/null >"$log" 2>&1 || done=0
    [ "$own" = 0 ] || rm -f "$policy"
    local reason
    reason=$(tail -n 1 "$log")
    rm -f "$log"
    [ "$done" = 1 ] || fail "installing slurm-wlm and munge failed: $reason"
}

# Daemons bind to the address of their host name. In a UTS namespace the name is `localhost`, even if this
# machine's own name does not resolve; jobs inherit it, so gloo uses the loopback interface too. If a
# namespace is not permitted, daemons bind to every address.
choose_host() {
    if unshare --uts true 2>/dev/null; then
        host=localhost bind=NoCtldInAddrAny,NoInAddrAny
    else
        host=$(hostname) bind=
    fi
}

configure() {
    dd if=/dev/urandom of="$state/munge.key" bs=1024 count=1 status=none
    chmod 400 "$state/munge.key"
    cat >"$SLURM_CONF" <<CONFIG
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
AuthType=auth/munge
# A requeued job starts again only after cred_expire, 120 s by default.
AuthInfo=socket=$state/munge.socket,cred_expire=10
${bind:+CommunicationParameters=$bind}
StateSaveLocation=$state/controller
SlurmdSpoolDir=$state/spool-%n
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd-%n.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
JobRequeue=1
KillWait=10
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# The nodes may claim more CPUs than this machine has.
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=16 Gres=gpu:2
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=16 Gres=gpu:2
PartitionName=batch Nodes=n[1-2] Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
CONFIG
    echo "NodeName=n[1-2] Name=gpu File=/dev/null,/dev/zero" >"$state/gres.conf"
    # Control groups are not used; the plugin of version 1 also works without them.
    echo "CgroupPlugin=cgroup/v1" >"$state/cgroup.conf"
}

# Start a daemon in its own session, with a variable in the environment that its children inherit.
start() {
    local command=("$@")
    [ "$host" != localhost ] || command=(unshare --uts sh -c 'hostname localhost; exec "$@"' sh "$@")
    MAML_LOCAL_SLURM_OF=$state setsid "${command[@]}" </dev/null >>"$state/daemons.log" 2>&1 &
}

wait_until() {
    local seconds=$1 what=$2
    shift 2
    local end=$((SECONDS + seconds))
    until "$@" >/dev/null 2>&1; do
        if ((SECONDS > end)); then
            local words
            words=$(cat "$state"/*.log | grep -iE 'error|fatal' | tail -n 1)
            take_down
            fail "$what did not start within $seconds s: ${words:-the logs show no error}"
        fi
        sleep 0.2
    done
}

credentials_work() {
    munge -n -S "$state/munge.socket" | unmunge -S "$state/munge.socket"
}

controller_is_up() {
    timeout 10 scontrol ping | grep -q "is UP"
}

idle() {
    [ "$(timeout 10 sinfo --noheader --partition=batch --states=idle --format=%D)" = 2 ]
}

status() {
    [ -e "$SLURM_CONF" ] || fail "no Slurm in $state; start one with: bash scripts/local_slurm.sh up"
    timeout 20 scontrol ping || fail "Slurm in $state does not respond; stop it with: bash scripts/local_slurm.sh down"
    timeout 20 sinfo
    timeout 20 squeue
}

down() {
    [ -e "$state" ] || fail "no Slurm in $state"
    [ -e "$SLURM_CONF" ] || [ -e "$state/munge.key" ] || [ -d "$state/controller" ] ||
        fail "MAML_LOCAL_SLURM is $state, which was not created by this script; nothing was removed"
    take_down
}

take_down() {
    trap - ERR INT TERM
    local signal end
    if controller_is_up 2>/dev/null; then
        timeout 10 squeue --noheader --format=%A | xargs --no-run-if-empty timeout 10 scancel --full --signal=KILL || true
        end=$((SECONDS + 10))
        while ((SECONDS < end)) && [ -n "$(timeout 10 squeue --noheader 2>/dev/null)" ]; do sleep 0.2; done
    fi
    for signal in TERM KILL; do
        end=$((SECONDS + 15))
        while [ -n "$(processes)" ] && ((SECONDS < end)); do
            # Some exit between listing and killing.
            processes | xargs --no-run-if-empty kill -s "$signal" 2>/dev/null || true
            sleep 0.3
        done
    done
    [ -z "$(processes)" ] || fail "these processes cannot be killed: $(processes | tr '\n' ' ')"
    rm -rf "$state"
}

# Print the pids of the daemons and job managers, and of the processes in their jobs.
processes() {
    local environment
    for environment in /proc/[0-9]*/environ; do
        if grep -qzxF "MAML_LOCAL_SLURM_OF=$state" "$environment" 2>/dev/null ||
            { grep -qzxF "SLURM_CONF=$SLURM_CONF" "$environment" && grep -qz "^SLURMD_NODENAME=" "$environment"; } 2>/dev/null; then
            environment=${environment#/proc/}
            echo "${environment%/environ}"
        fi
    done
}

case "${1-}" in
up | down | status) "$1" ;;
*) fail "usage: bash scripts/local_slurm.sh up|down|status" ;;
esac
