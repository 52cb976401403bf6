# What the scripts for GPU machines and clusters share. Source it with the script's arguments, in the repository's root:
#     . launch/commands.sh "$@"
# It takes --dry_run out of the arguments, and puts the others into the array `options`.

dry_run=false
options=()
for option in "$@"; do
    if [ "$option" = --dry_run ]; then dry_run=true; else options+=("$option"); fi
done

# Print a command so that it can be pasted into a shell, and unless --dry_run is given run it in .venv.
run() {
    local word line=
    for word in "$@"; do
        if [[ $word =~ [^A-Za-z0-9_./:=,@%+-] ]]; then word=${word@Q}; fi
        line+=" $word"
    done
    echo "${line# }"
    if [ "$dry_run" = false ]; then
        . launch/setup.sh train
        "$@"
    fi
}

# Stop, before anything is set up, unless this machine has so many GPUs. A dry run needs none.
need_gpus() {
    local found
    if [ "$dry_run" = true ]; then return; fi
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        found=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true)
    else
        found=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
    fi
    if [ "$found" -lt "$1" ]; then
        echo "$(basename "$0"): this needs $1 GPUs, and this machine has $found. Set GPUS to use fewer, or give" \
            "--dry_run to see the commands alone." >&2
        exit 1
    fi
}
