# shellcheck shell=bash
# Shared by the job scripts, which source it.
fail() {
    echo "slurm: error: $*" >&2
    exit 2
}

cd "$SLURM_SUBMIT_DIR" || exit
cluster_env=${MAML_CLUSTER_ENV:-${MAML_JOB_SCRIPTS:-$SLURM_SUBMIT_DIR/slurm}/cluster.env}
[ -r "$cluster_env" ] || fail "this node cannot read $cluster_env"
# Before `set -eu`, as at submission: the file may contain any shell code, such as `module load`, which reads
# variables that are not set.
# shellcheck source=cluster.env
source "$cluster_env"
set -euo pipefail

MAX_RESTARTS=5

# Set `devices` to the flags that make `maml` use the whole allocation. The configuration file and the
# flags of the user override them; `maml` refuses values that differ from the allocation.
take_allocation() {
    local tasks=${SLURM_NTASKS_PER_NODE:-1} gpus=${SLURM_GPUS_ON_NODE:-}
    if [ -n "$gpus" ] && [ "$gpus" != "$tasks" ]; then
        fail "this job has $gpus GPUs but $tasks tasks on a node; submit it with" \
            "--gpus-per-node=$gpus --ntasks-per-node=$gpus"
    fi
    # shellcheck disable=SC2034  # read by the job scripts
    devices=(--trainer.devices "$tasks" --trainer.num_nodes "$SLURM_NNODES")
}

# Run `maml ARGUMENTS` once for every device. If a process is killed (by the kernel for its memory, by a
# failing GPU, by hand), its shell requeues the job. If `maml` is asked to stop, it requeues the job itself,
# after saving: maml_pipeline/learner/preemption.py has the whole sequence.
launch() {
    local first status=0
    read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    # The address that Slurm uses: node names may not resolve, and nodes may share a machine.
    MASTER_ADDR=$(scontrol --oneliner show node "$first" | sed 's/.* NodeAddr=\([^ ]*\).*/\1/')
    MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))
    export MASTER_ADDR MASTER_PORT
    # Compute nodes often have no network.
    export WANDB_MODE=${WANDB_MODE:-offline} MAML_OFFLINE=1
    local python=${MAML_PYTHON:-$SLURM_SUBMIT_DIR/.venv/bin/python}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

    # shellcheck disable=SC2016,SC2086  # the task's shell expands TASK; options are split into words
    srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" ${MAML_SRUN_OPTIONS:-} \
        bash -c "$(declare -f job_id requeue); MAX_RESTARTS=$MAX_RESTARTS; $TASK" task \
        ${MAML_COMMAND:-"$python" -P -m maml_pipeline} "$@" || status=$?
    # Preemption has ended a process that was just starting. Otherwise a process ended with an error, and srun
    # ended the others.
    if ((status > 128)) && is_preempted; then requeue; fi
    exit "$status"
}

# One process of maml. Slurm's signals reach this shell too, which waits. A process that dies after SIGTERM,
# which comes before Slurm's SIGKILL, was ended by Slurm. srun's status does not tell: it may be that of a
# process that srun ended.
# shellcheck disable=SC2016  # expanded by the task's own shell
TASK='trap : USR1
trap is_ended=yes TERM
"$@"
status=$?
if ((status > 128 && status != 143)) && [ -z "${is_ended:-}" ]; then
    echo "slurm: the process of rank $SLURM_PROCID was killed by signal $((status - 128))" >&2
    requeue
fi
exit $status'

# The id of this job alone: SLURM_JOB_ID of one element of every array is the id of the whole array.
job_id() {
    echo "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
}

is_preempted() {
    scontrol --oneliner show job "$(job_id)" | grep -q ' PreemptTime=[0-9]'
}

requeue() {
    local job restarts=${SLURM_RESTART_COUNT:-0}
    job=$(job_id)
    # A job that was cancelled, or reached its time limit, must not be requeued. `maml` refuses only
    # the states of an ending job (maml_pipeline/slurm/job.py): it acts on a signal that precedes the end.
    [ "$(squeue --noheader --jobs="$job" --format=%T)" = RUNNING ] || return 0
    if ((restarts >= MAX_RESTARTS)); then
        echo "slurm: a process was killed after $restarts restarts; the job is not requeued" >&2
    else
        echo "slurm: a process was killed; the job is requeued, restart $((restarts + 1))" >&2
        scontrol requeue "$job"
    fi
}
