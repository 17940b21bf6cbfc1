#!/usr/bin/env bash
# For a pipeline to copy: record on the branch that is trusted, compare on the one that is not.
#
#   golden.sh record  FILE [options]    on main; keep FILE as an artefact
#   golden.sh compare FILE [options]    on a pull request, on any machine, with FILE from main
#
# Options go to twinmoe golden record or compare (--device cuda, --transport p2p, ...).
# compare shares the tokens by each of $GOLDEN_EP ranks (default: 1 2 4), writes a JUnit and a JSON
# report for each into $REPORTS (default: reports), and exits 1 if any is not equivalent, 2 if the
# file or the request is unusable.
set -euo pipefail
if [[ $# -lt 2 || ! $1 =~ ^(record|compare)$ ]]; then
    echo "usage: golden.sh record|compare FILE [options]" >&2
    exit 2
fi
action=$1 file=$2
shift 2
if [[ $action == record ]]; then
    exec twinmoe golden record "$file" "$@"
fi
reports=${REPORTS:-reports}
mkdir -p "$reports"
worst=0
for ep in ${GOLDEN_EP:-1 2 4}; do
    status=0
    twinmoe golden compare "$file" --ep "$ep" --junit "$reports/golden-ep$ep.xml" \
        --json "$reports/golden-ep$ep.json" "$@" || status=$?
    if ((status > worst)); then worst=$status; fi
done
exit "$worst"
