#!/bin/bash
# Measures one machine with a GPU in eight minutes, offline. Tried on a CPU only.
#
#     bash benchmarks/gpu.sh OUT [WHEELS]
#
# OUT: a folder for the results. WHEELS: a folder with wheels of mlx (on Linux with
# mlx-cuda), mlx-lm and the other dependencies; without it they must be installed.
#
# Variables: SIZES of models with random weights (without any, the demo model is
# compared), ROUNDS of each comparison, SECONDS_IN_ALL, COPIES (the options of
# cache_copies.py), PYTHON. On a CPU, in minutes:
#
#     SIZES= ROUNDS=1 COPIES="--slots 1024 --layers 1" bash benchmarks/gpu.sh OUT
set -u
[ $# -ge 1 ] || { echo "usage: bash benchmarks/gpu.sh OUT [WHEELS]" >&2; exit 2; }
OUT=$(mkdir -p "$1" && cd "$1" && pwd) || exit
WHEELS=${2:+$(cd "$2" && pwd)} || exit
cd "$(dirname "$0")/.." || exit
PYTHON=${PYTHON:-python3}
SIZES=${SIZES-270M 1.1B}
END=$(($(date +%s) + ${SECONDS_IN_ALL:-480}))
FAILED=0

run() { # run NAME LIMIT COMMAND...: its output in OUT/NAME, unless no time is left
    local name=$1 limit=$2 left=$((END - $(date +%s))) code
    shift 2
    [ "$left" -lt "$limit" ] && limit=$left
    [ "$limit" -lt 5 ] && { echo "$name: no time was left"; FAILED=1; return; }
    if command -v timeout > /dev/null; then # macOS has none
        set -- timeout "$limit" "$@"
    fi
    "$@" > "$OUT/$name" 2> "$OUT/$name.log"
    code=$?
    [ "$code" -eq 0 ] || FAILED=1
    echo "$name: exit $code, $((END - $(date +%s))) s left"
}

if [ -n "$WHEELS" ]; then
    $PYTHON -m venv "$OUT/venv"
    PYTHON=$OUT/venv/bin/python
    run install.txt 120 "$PYTHON" -m pip install --no-index --find-links "$WHEELS" . mlx-lm
fi
export HF_HUB_OFFLINE=1 MLX_OPENELM_TUNING=$OUT/tuning.json
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
M=("$PYTHON" -m mlx_openelm)
run device.txt 20 "$PYTHON" -c "import mlx.core as mx; print(mx.device_info())"
run selfcheck.json 60 "${M[@]}" selfcheck --json
run tune.json 170 "${M[@]}" selfcheck --tune --seconds 120 --json
run copies.txt 60 "$PYTHON" benchmarks/cache_copies.py ${COPIES:-}
MODELS=(demo)
if [ -n "$SIZES" ]; then # in folders that mlx-lm opens, too
    run models.txt 60 "$PYTHON" benchmarks/random_models.py "$OUT/models" $SIZES
    MODELS=()
    for size in $SIZES; do MODELS+=("$OUT/models/$size" "$OUT/models/$size-4bit"); done
fi
for model in "${MODELS[@]}"; do
    run "against-$(basename "$model").json" 90 "${M[@]}" bench --against mlx-lm \
        --model "$model" --rounds "${ROUNDS:-2}" --json
done
exit $FAILED
