#!/bin/sh
# Python for a rehearsal of bench/gpu.sh (see rehearsal.py). REHEARSE_PYTHON is the interpreter, python3 by default.
exec "${REHEARSE_PYTHON:-python3}" -m tests.gpu.rehearsal "$@"
