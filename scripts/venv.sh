# shellcheck shell=bash
# Sourced by demo.sh, test.sh and .ci/run, in the repository root: one virtual environment for all three.
#
#   PYTHON  the Python to make it with (default: python3)
#   TORCH   what to ask pip for instead of the torch chosen here, such as TORCH=torch

VENV=$PWD/.venv

say() { printf '%s\n' "$*" >&2; }

fail() {
    say "error: $*"
    exit 1
}

has_nvidia_gpu() { nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

# The requirement for torch. PyPI's torch is the CUDA build, gigabytes of it; the CPU build
# is the one whose version ends in +cpu, so that pip finds it or nothing.
torch_requirement() {
    if [ -n "${TORCH:-}" ]; then
        echo "$TORCH"
    elif has_nvidia_gpu; then
        echo "torch>=2.11"
    else
        echo "torch==2.13.0+cpu"
    fi
}

# install_project [EXTRA]: makes .venv and installs the project into it, in place, with the packages of EXTRA.
# Where that was done before and nothing that decides it has changed, it does nothing.
install_project() {
    local extra=${1:-} python=${PYTHON:-python3} torch stamp state version
    torch=$(torch_requirement)
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 11))') ||
        fail "Python 3.11 or newer is needed, and $python is ${version:-not there}; set PYTHON to one"
    stamp=$VENV/installed${extra:+-$extra}
    state=$(cat pyproject.toml setup.py | cksum)" $PWD $version $torch"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$state" ] && "$VENV/bin/python" -c '' 2>/dev/null; then
        return
    fi
    if [ "$("$VENV/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" != "$version" ]; then
        say "==> Making .venv with Python $version"
        "$python" -m venv --clear "$VENV" || fail "$python cannot make a virtual environment; install its venv module"
    fi
    say "==> Installing $torch"
    pip_install "$torch" || case $torch in
        *+cpu) fail "pip found no $torch; set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels and run this again," \
            "or set TORCH=torch to take whatever build pip finds, which may be gigabytes of CUDA" ;;
        *) fail "pip could not install $torch" ;;
    esac
    say "==> Installing ds_offload${extra:+ with its $extra packages}"
    pip_install --editable ".${extra:+[$extra]}" || fail "pip could not install ds_offload"
    echo "$state" >"$stamp"
}

pip_install() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
