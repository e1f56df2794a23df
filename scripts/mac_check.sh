#!/usr/bin/env bash
# For the owner of a Mac with Apple Silicon, who helps us: no Apple GPU was at hand when the Metal kernels were written.
#
#     scripts/mac_check.sh                        # some ten minutes; writes mac_check.json, the file to send back
#     scripts/mac_check.sh --model FOLDER_OR_ID   # times that model too, beside the bundled one; --help shows all flags
#     PYTHON=python3.12 scripts/mac_check.sh      # where python3 is older than 3.11
#
# THIS SCRIPT AND mac_check.py HAVE NEVER RUN ON A MAC: only on Linux, with a stub of xcrun and an emulated GPU.
#
# It makes .venv by the Makefile's rule, compiles every kernel with xcrun, runs the kernels on the GPU against stored
# results, and times the benchmark with kernels on, with kernels off, and mlx-lm, in turn. A part that fails costs its
# own figures and is named. The file tells the machine's chip and software; the path of your home is left out.
# Exit code: 0 when all parts went well, 1 when one did not, 2 for a wrong flag.
set -euo pipefail
cd "$(dirname "$0")/.."

out=mac_check.json
log=$(mktemp)
trap 'rm -f "$log" "$out.part"' EXIT
if ! make .venv/.installed-test 2>&1 | tee "$log"; then
  # Nothing else can be done, and there may be no Python: only characters that JSON takes as they are.
  why=$(tail -n 5 "$log" | sed "s|$HOME|~|g" | tr '\n\t' '  ' | LC_ALL=C tr -cd "[:alnum:] .,:;/~=<>_+()'-")
  printf '{"failed": ["environment"], "environment": {"failure": "%s"}}\n' "$why" > "$out.part"
  mv "$out.part" "$out"
  echo "environment: failed; please send back $out all the same"
  exit 1
fi
PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" .venv/bin/python scripts/mac_check.py --json "$out" "$@"
