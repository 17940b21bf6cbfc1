#!/usr/bin/env bash
# For a pipeline to copy: before a release, show that the kill switch still falls back.
#
#   killswitch.sh [options]    options go to twinmoe killswitch (--device cuda --timeout 120, ...)
#
# Validates groups of each of $KILLSWITCH_EP ranks (default: 1 2 4); exits 1 if any does not fall
# back, 2 if it could not run.
set -euo pipefail
worst=0
for ep in ${KILLSWITCH_EP:-1 2 4}; do
    status=0
    twinmoe killswitch --ep "$ep" "$@" || status=$?
    if ((status > worst)); then worst=$status; fi
done
exit "$worst"
