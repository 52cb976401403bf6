# Sets up .venv beside pyproject.toml and activates it; source it, with the extras to install:
#     . launch/setup.sh train         or: train,test
# Does nothing but activate when the same pyproject.toml, constraints.txt and extras are installed already.
# Needs Python 3.11 to 3.13 with its headers and a C++ compiler (DeepSpeed compiles small operators). PYTHON names
# another interpreter than the first suitable one of the PATH.

ds_memopt_setup() {
    local extras=$1 root python= candidate stamp wanted lock
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || return 1
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "setup: no Python 3.11, 3.12 or 3.13 found (tried: ${PYTHON:-python3 python3.13 python3.12 python3.11})." \
            "Install one, or set PYTHON to its path." >&2
        return 1
    fi
    if ! command -v "${CXX:-c++}" >/dev/null; then
        echo "setup: no C++ compiler (${CXX:-c++}). Install one (Debian, Ubuntu: apt-get install g++), or set CXX." >&2
        return 1
    fi
    if ! "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'; then
        echo "setup: $python has no header Python.h, which compiling DeepSpeed's operators needs." \
            "Install it (Debian, Ubuntu: apt-get install python3-dev)." >&2
        return 1
    fi

    stamp=$root/.venv/ds_memopt-$extras.stamp
    wanted=$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)
    if [ ! -x "$root/.venv/bin/python" ]; then
        echo "setup: creating .venv"
        if ! "$python" -m venv "$root/.venv"; then
            echo "setup: $python cannot make a virtual environment." \
                "Install its venv module (Debian, Ubuntu: apt-get install python3-venv)." >&2
            rm -rf "$root/.venv"
            return 1
        fi
    fi
    . "$root/.venv/bin/activate" || return 1
    # Operators beside the packages that they were compiled for. A compilation that was killed leaves a lock behind, for
    # which torch would wait for ever: remove it unless a process still holds it open.
    export TORCH_EXTENSIONS_DIR=$root/.venv/torch_extensions
    for lock in "$TORCH_EXTENSIONS_DIR"/*/lock; do
        if [ -e "$lock" ] && [ -z "$(find /proc/[0-9]*/fd -lname "$lock" 2>/dev/null)" ]; then
            rm -f "$lock"
        fi
    done
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "setup: installing ds_memopt[$extras] with pinned versions (once; minutes)"
        # torch first: the build that pip picks for this machine satisfies every later requirement.
        if ! pip install --quiet --disable-pip-version-check "$(grep '^torch==' "$root/constraints.txt")" ||
            ! pip install --quiet --disable-pip-version-check -e "$root[$extras]" -c "$root/constraints.txt"; then
            echo "setup: pip failed, see above. Run the same command again to continue." >&2
            return 1
        fi
        # What would else be compiled in the first run, where that looks like a hang.
        echo "setup: compiling DeepSpeed's operators and ours for the CPU (once; a minute)"
        if ! python - <<'END' >"$root/.venv/operators.log" 2>&1; then
from deepspeed.accelerator import get_accelerator

from ds_memopt.kernels.cpp.build import library

library()
if get_accelerator().device_name() == "cpu":
    for name in ("ShareMemCommBuilder", "FusedAdamBuilder"):
        get_accelerator().create_op_builder(name).load()
END
            tail -n 20 "$root/.venv/operators.log" >&2
            echo "setup: compiling failed, see above; is the C++ compiler complete? Run the same command again." >&2
            return 1
        fi
        echo "$wanted" >"$stamp"
    fi
}

ds_memopt_setup "${1:-train}"
