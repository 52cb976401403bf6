#!/usr/bin/env bash
# Runs a job on the machines of a hostfile, see launch/hostfile.example. They reach each other by ssh without a password
# and see this folder, .venv included, at the same path.
#     bash launch/multi_node.sh --launcher pdsh --hostfile FILE [options of the job]
#     bash launch/multi_node.sh --launcher openmpi --hostfile FILE [...]     ranks by mpirun and mpi4py
#     bash launch/multi_node.sh --launcher torchrun --hostfile FILE [...]    FSDP2 in the place of DeepSpeed
# --dry_run shows the command. JOB: the script to run, by default launch/pretrain.py, with torchrun
# launch/pretrain_fsdp2.py. INTERFACE: the network interface of openmpi, default eth0. LAUNCHER_ARGS: more options for
# mpirun. MASTER_ADDR, MASTER_PORT: where the ranks meet, by default on the first machine, port 29500.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/commands.sh "$@"

usage() {
    echo "multi_node.sh: $* See the top of launch/multi_node.sh." >&2
    exit 1
}

launcher= hostfile= job_options=()
set -- "${options[@]}"
while [ $# -gt 0 ]; do
    case $1 in
        --launcher | --hostfile)
            [ $# -gt 1 ] || usage "$1 needs a value."
            if [ "$1" = --launcher ]; then launcher=$2; else hostfile=$2; fi
            shift 2
            ;;
        *)
            job_options+=("$1")
            shift
            ;;
    esac
done
[ -f "$hostfile" ] || usage "--hostfile '$hostfile' is no file."
hosts=$(awk '!/^#/ && NF {print $1}' "$hostfile" | paste -sd,)
slots=$(sed -n '/^#/!s/.*slots=\([0-9]*\).*/\1/p' "$hostfile" | sort -u)
master_addr=${MASTER_ADDR:-${hosts%%,*}}
master_port=${MASTER_PORT:-29500}

case $launcher in
    pdsh)
        run deepspeed --hostfile "$hostfile" --master_addr "$master_addr" --master_port "$master_port" --force_multi \
            "${JOB:-launch/pretrain.py}" "${job_options[@]}"
        ;;
    openmpi)
        # Without --bind-to none all threads of a rank, those that load data included, would share one core.
        mpirun_options="--bind-to none --mca btl_tcp_if_include ${INTERFACE:-eth0} -x MASTER_ADDR -x MASTER_PORT"
        run env MASTER_ADDR="$master_addr" MASTER_PORT="$master_port" deepspeed --launcher openmpi \
            --hostfile "$hostfile" --master_addr "$master_addr" --force_multi \
            --launcher_args "$mpirun_options${LAUNCHER_ARGS:+ $LAUNCHER_ARGS}" \
            "${JOB:-launch/pretrain.py}" "${job_options[@]}"
        ;;
    torchrun)
        [ "$(wc -w <<<"$slots")" -eq 1 ] || usage "torchrun needs as many slots on all machines, $hostfile has: $slots."
        machines=$(tr ',' '\n' <<<"$hosts" | wc -l)
        # pdsh puts the number of the machine in the place of %n.
        on_each=$(printf '%q ' .venv/bin/torchrun --nnodes "$machines" --node_rank %n --nproc_per_node "$slots" \
            --master_addr "$master_addr" --master_port "$master_port" "${JOB:-launch/pretrain_fsdp2.py}" \
            "${job_options[@]}")
        run pdsh -S -R ssh -w "$hosts" "cd $(printf '%q' "$PWD") && ${on_each% }"
        ;;
    *)
        usage "--launcher '$launcher' is none of pdsh, openmpi and torchrun."
        ;;
esac
