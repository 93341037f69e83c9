#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Set-up, build, demonstration and tests, from a fresh checkout on a machine with Python >= 3.10:
#
#   ./build.sh              install what is missing, build into .venv
#   ./build.sh demo         ... and run the demonstration
#   ./build.sh test [...]   ... and run the default tests (--all: also the slow ones; more arguments go to pytest)
#   ./build.sh nightly      ... and run every test, also those that take an hour
#   ./build.sh bench [...]  ... and measure each stage, or, with --training or --growth first, what checkpoints cost training and
#                           how time and memory grow; writes into build/ (docs/performance.md has the options)
#   ./build.sh fuzz [...]   ... and fuzz every parser with sanitizers (docs/fuzzing.md has the options)
#   ./build.sh lint         ... and check style and documents
#
# Run again, set-up and build cost nothing when nothing changed.
set -eu
cd "$(dirname "$0")"
venv=.venv

say() { printf 'build.sh: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

find_python() {
    for python in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10; do
        if command -v "$python" >/dev/null && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
            printf '%s' "$python"
            return
        fi
    done
    die "no Python >= 3.10 found; install one, or name it: PYTHON=/path/to/python ./build.sh"
}

# install NAME...: system packages, by apt-get when root, else by telling which.
install() {
    if ! command -v apt-get >/dev/null; then
        die "missing on this system: $*. These are Debian's names; docs/install.md has those of others"
    elif [ "$(id -u)" != 0 ]; then
        die "missing: $*. Run: sudo apt-get install -y $*"
    fi
    say "installing $*"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq >/dev/null
    apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

system_packages() {
    missing=""
    command -v cc >/dev/null || missing="$missing gcc libc6-dev"
    if ! command -v pkg-config >/dev/null; then
        missing="$missing pkg-config libdpdk-dev"
    elif ! pkg-config --atleast-version=22.11 libdpdk 2>/dev/null; then
        missing="$missing libdpdk-dev"
    fi
    [ -e /usr/include/pcap/pcap.h ] || missing="$missing libpcap-dev"
    headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [ -e "$headers/Python.h" ] || missing="$missing python3-dev"
    "$python" -c 'import ensurepip' 2>/dev/null || missing="$missing python3-venv"
    # A live demonstration builds a network; only root can.
    [ "$(id -u)" != 0 ] || command -v tc >/dev/null || missing="$missing iproute2"
    # shellcheck disable=SC2086
    [ -z "$missing" ] || install $missing
}

fingerprint() {
    { cat setup.py setup.cfg pyproject.toml constraints.txt; pkg-config --modversion libdpdk; "$python" --version
      git ls-files -z '*.pyx' '*.pxd' '*.h' | xargs -0 cat; } | sha256sum
}

build() {
    python=$(find_python)
    system_packages
    now=$(fingerprint)
    if [ "$(cat "$venv/flowcheck-built" 2>/dev/null)" = "$now" ]; then
        return
    fi
    say "building into $venv"
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install -q -c constraints.txt setuptools wheel Cython
    "$venv/bin/python" -m pip install -q --no-build-isolation -c constraints.txt -e '.[test]'
    printf '%s\n' "$now" >"$venv/flowcheck-built"
}

run_tests() {
    if ! command -v tshark >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        install tshark
    fi
    if [ "${1:-}" = --all ]; then
        shift
        exec "$venv/bin/python" -m pytest -m 'not nightly' "$@"
    fi
    exec "$venv/bin/python" -m pytest -m 'not slow and not nightly' "$@"
}

# fuzzers: clang with libFuzzer's and the sanitizers' runtime, and atheris.
fuzzers() {
    if ! "$venv/bin/python" -c 'import sys; from fuzz.compiled import clang; sys.exit(clang() is None)'; then
        command -v clang >/dev/null || install clang
        install "libclang-rt-$(clang -dumpversion | cut -d. -f1)-dev"
    fi
    "$venv/bin/python" -c 'import atheris' 2>/dev/null || "$venv/bin/python" -m pip install -q -c constraints.txt atheris
}

target=${1:-build}
[ $# = 0 ] || shift
case "$target" in
    build) build ;;
    demo) build; exec "$venv/bin/flowcheck" demo "$@" ;;
    test) build; run_tests "$@" ;;
    nightly) build; exec "$venv/bin/python" -m pytest "$@" ;;
    bench)
        build
        module=bench
        case "${1:-}" in
            --training) module=bench.training_overhead; shift ;;
            --growth) module=bench.growth; shift ;;
        esac
        exec "$venv/bin/python" -m "$module" "$@" ;;
    fuzz) build; fuzzers; exec "$venv/bin/python" -m fuzz.run "$@" ;;
    lint) build; "$venv/bin/ruff" check .; exec "$venv/bin/ruff" format --check . ;;
    *) die "unknown target '$target'; expected demo, test, nightly, bench, fuzz, lint, or nothing" ;;
esac
