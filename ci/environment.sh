# Sourced by the scripts beside it: go to the checkout's root, make .venv if needed, put it first
# on PATH.  Needs python3 with venv.  Nothing is installed, and no network is touched, while the
# stamp still names these requirements, this Python and this folder.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

twinmoe_stamp() {
    { cat pyproject.toml ci/constraints.txt; python3 -VV; pwd -P; } | sha256sum
}

twinmoe_install() {
    echo "ci: installing into $PWD/.venv" >&2
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "ci: $(python3 -V) is too old: twinmoe needs Python 3.11 or newer as python3" >&2
        return 2
    fi
    # Kept where it fits, so that an edit of pyproject.toml costs seconds and works offline.
    if [[ "$(.venv/bin/python -VV 2>/dev/null)" != "$(python3 -VV)" ]]; then
        python3 -m venv --clear .venv
    fi
    # torch first, so that its pinned build is settled before anything that depends on it.
    .venv/bin/python -m pip install --quiet -c ci/constraints.txt torch setuptools
    .venv/bin/python -m pip install --quiet -c ci/constraints.txt --no-build-isolation \
        -e '.[test,lint,plot]'
}

# Two scripts started together must not install into one folder at the same time.
exec 9<ci/constraints.txt
flock 9
stamp=$(twinmoe_stamp)
if [[ "$(cat .venv/stamp 2>/dev/null)" != "$stamp" ]]; then
    twinmoe_install
    echo "$stamp" >.venv/stamp
fi
exec 9<&-

export VIRTUAL_ENV="$PWD/.venv" PATH="$PWD/.venv/bin:$PATH"
