#!/usr/bin/env bash
# Makes the tables of this folder: results/real_robots/make_tables.sh DATA WORK
#   DATA  folder with lerobot_cr5_banana and bridge_rlds (tests/data has cuts of both, their NOTICE files say where they come from)
#   WORK  folder for stores and exports; what is finished there is not done again
set -euo pipefail
data=${1:?folder with the data sets} work=${2:?folder for stores and exports}
python=${PYTHON:-python}
results=$(dirname "$0")

split() { # split LAST: every fifth episode is held out
	held=$(seq -s, 0 5 "$1")
	kept=$(seq 0 "$1" | awk '$1 % 5' | paste -sd,)
}

split 80
for part in train:$kept held:$held; do
	"$python" -m data convert --source lerobot --path "$data/lerobot_cr5_banana" --episodes "${part#*:}" --output "$work/cr5_${part%%:*}"
done
"$python" -m train distill --data "$work/cr5_train" --output "$work/cr5_export" --generators "[mlp]" --baselines "[ridge,last]" \
	--calibration_fraction 0.3125 --steps 1000 --gate_steps 500 --batch_size 512 --mlp "{width: 192, depth: 3}"
"$python" -m eval offline --data "$work/cr5_held" --export "$work/cr5_export" --output "$results/cr5"

split 24
for part in train:$kept held:$held; do
	"$python" -m data convert --source rlds --path "$data/bridge_rlds/bridge_dataset" --episodes "${part#*:}" --output "$work/bridge_${part%%:*}"
done
"$python" -m train distill --data "$work/bridge_train" --output "$work/bridge_export" --generators "[mlp]" --baselines "[ridge,last]" \
	--calibration_fraction 0.5 --steps 300 --gate_steps 200 --batch_size 128
"$python" -m eval offline --data "$work/bridge_held" --export "$work/bridge_export" --output "$results/bridge" --risk "[0.091,0.1,0.15,0.2,0.3]"
