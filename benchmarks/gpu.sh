#!/bin/bash
# Measures one machine with a GPU in eight minutes, offline. Not run so far.
#
#     bash benchmarks/gpu.sh OUT [WHEELS]
#
# OUT: a new folder for the results. WHEELS: a folder with wheels of mlx (on Linux with
# mlx-cuda), mlx-lm and the other dependencies; without it they must be installed.
set -u
OUT=$(mkdir -p "$1" && cd "$1" && pwd)
WHEELS=${2:-}
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
END=$(($(date +%s) + ${SECONDS_IN_ALL:-480}))

run() { # run NAME LIMIT COMMAND...: its output in OUT/NAME, unless no time is left
    local name=$1 limit=$2 left=$((END - $(date +%s)))
    shift 2
    [ "$left" -lt "$limit" ] && limit=$left
    [ "$limit" -lt 5 ] && { echo "$name: no time was left"; return; }
    timeout "$limit" "$@" > "$OUT/$name" 2> "$OUT/$name.log"
    echo "$name: exit $?, $((END - $(date +%s))) s left"
}

if [ -n "$WHEELS" ]; then
    $PYTHON -m venv "$OUT/venv"
    PYTHON=$OUT/venv/bin/python
    run install.txt 120 "$PYTHON" -m pip install --no-index --find-links "$WHEELS" . mlx-lm
fi
export HF_HUB_OFFLINE=1 MLX_OPENELM_TUNING=$OUT/tuning.json
M="$PYTHON -m mlx_openelm"
run device.txt 20 "$PYTHON" -c "import mlx.core as mx; print(mx.device_info())"
run selfcheck.json 60 $M selfcheck --json
run tune.json 150 $M selfcheck --tune --json
run copies.txt 60 "$PYTHON" benchmarks/cache_copies.py
# Random weights of the released sizes, in folders that mlx-lm opens, too.
run models.txt 60 "$PYTHON" benchmarks/random_models.py "$OUT/models" 270M 1.1B
for name in 270M 270M-4bit 1.1B 1.1B-4bit; do
    run "against-$name.json" 90 $M bench --against mlx-lm --model "$OUT/models/$name" \
        --rounds 2 --json
done
