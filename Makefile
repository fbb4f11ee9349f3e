# Everything sets itself up on a fresh Debian/Ubuntu machine with Python 3.11 or newer.
#   make demo          the whole system: the packaged small VLA from pixels in LIBERO, and tasks of Meta-World; films and a report
#   make distill-demo  record a VLA, distil a generator and its gate from it, evaluate them (SIMULATOR=metaworld: fifty tasks, quick)
#   make check         lint, types, documentation and the unit tests, in two minutes
#   make test          the same and everything slow
#   make docs          the documentation as a site in site/
# PIP_ARGS is passed to pip, for example to choose a CPU build of torch:
#   make test PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
LEROBOT_VENV ?= .venv-lerobot
LEROBOT_PYTHON ?= $(shell for p in python3.12 $$(ls -d "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.12*/bin/python 2>/dev/null); do \
	$$p -c '' 2>/dev/null && { echo $$p; break; }; done)
PIP_ARGS ?=
RUNS ?= runs
SUDO ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SYSTEM_LIBRARIES := libegl1 libgl1 libgles2 libopengl0

export MUJOCO_GL ?= egl
export PYOPENGL_PLATFORM ?= egl
export OMP_NUM_THREADS ?= 1

.PHONY: setup system demo distill-demo check unit test test-lerobot test-inspect-robots lint docs clean

setup: system $(READY)

# Rendering needs Mesa's EGL, OpenCV needs libgl1. Installed by root, or with SUDO=1; otherwise the command is said.
system:
	@missing=""; for p in $(SYSTEM_LIBRARIES); do dpkg -s $$p >/dev/null 2>&1 || missing="$$missing $$p"; done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then \
		echo "Not a Debian/Ubuntu machine: make sure that EGL and OpenGL ES are installed."; exit 0; fi; \
	if [ "$$(id -u)" = 0 ]; then sudo=""; elif [ "$(SUDO)" = 1 ]; then sudo="sudo"; else \
		echo "These system libraries are missing. Install them, or let make do it with SUDO=1:  sudo apt-get install$$missing"; \
		exit 1; fi; \
	echo "installing$$missing"; $$sudo apt-get update -qq && $$sudo apt-get install -y -qq $$missing >/dev/null

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	"$(PYTHON)" -m venv "$(VENV)" || { echo "No venv module: sudo apt-get install python3-venv"; exit 1; }
	"$(BIN)/pip" install -q -c constraints.txt $(PIP_ARGS) torch
	"$(BIN)/pip" install -q -c constraints.txt $(PIP_ARGS) -e ".[train,eval,libero,metaworld,onnx,serve,rerun,docs,dev]"
	"$(BIN)/pip" install -q --no-deps $(PIP_ARGS) metaworld==3.1.1  # it asks for another MuJoCo than LIBERO, and runs with LIBERO's
	@touch "$(READY)"

demo: setup
	"$(BIN)/python" -m eval closed_loop --config configs/eval/demo.yaml --output "$(RUNS)/demo/results/closed_loop"
	"$(BIN)/python" -m eval closed_loop --config configs/eval/demo_metaworld.yaml --output "$(RUNS)/demo/results/metaworld"
	"$(BIN)/python" -m eval latency --config configs/eval/latency_nano.yaml --output "$(RUNS)/demo/results/latency"
	"$(BIN)/python" -m eval report --results "$(RUNS)/demo/results" --output "$(RUNS)/demo/report.html" --title "SP-VLA: a small VLA from pixels, and Meta-World"

# libero: the small VLA from pixels. metaworld: the scripted experts of fifty tasks in a VLA's place, quick.
SIMULATOR ?= libero
distill-demo: D = $(RUNS)/distill_demo/$(SIMULATOR)
distill-demo: C = configs/distill_demo/$(SIMULATOR)
distill-demo: DISTILL = "$(BIN)/python" -m train distill --config "$C/distill.yaml"
distill-demo: setup
	@test -d "$C" || { echo "SIMULATOR is libero or metaworld, got $(SIMULATOR)"; exit 2; }
	"$(BIN)/python" -m data collect --config "$C/train.yaml" --output "$D/rollouts"
	"$(BIN)/python" -m data collect --config "$C/calibration.yaml" --output "$D/rollouts"
	$(DISTILL) --data "$D/rollouts" --output "$D/first_export"
	"$(BIN)/python" -m data collect --config "$C/on_policy.yaml" --export "$D/first_export" --output "$D/on_policy"
	$(DISTILL) --data "$D/rollouts" "$D/on_policy" --output "$D/export"
	"$(BIN)/python" -m eval closed_loop --config "$C/evaluate.yaml" --export "$D/export" --output "$D/results/closed_loop"
	"$(BIN)/python" -m eval report --results "$D/results" --output "$D/report.html" --title "A generator of your own"

# A line for each test as it ends, on as many processes as WORKERS.
WORKERS ?= 2
PYTEST = "$(BIN)/python" -m pytest -v -n $(WORKERS) --dist worksteal

check: setup
	@$(MAKE) --no-print-directory -j 2 lint unit

unit: $(READY)
	$(PYTEST)

test: setup lint
	$(PYTEST) -m "slow or not slow" --durations=10

# The adapter to LeRobot's policies and the plugin, with LeRobot itself: an environment of its own, Python 3.12.
test-lerobot:
	@test -n "$(LEROBOT_PYTHON)" || { echo "LeRobot needs Python 3.12: make test-lerobot LEROBOT_PYTHON=/path/to/python3.12"; exit 1; }
	"$(LEROBOT_PYTHON)" -m venv "$(LEROBOT_VENV)"
	"$(LEROBOT_VENV)/bin/pip" install -q -c constraints-lerobot.txt $(PIP_ARGS) "lerobot[dataset,pusht,smolvla]" scipy pytest hypothesis "jsonargparse[signatures]"
	"$(LEROBOT_VENV)/bin/pip" install -q --no-deps -e . -e integrations/lerobot_policy_spvla
	"$(LEROBOT_VENV)/bin/python" -m pytest -q tests/test_foreign.py tests/test_lerobot_plugin.py tests/test_lerobot_smolvla.py

# The plugin for inspect-robots, with inspect-robots itself, in the same environment.
test-inspect-robots: $(READY)
	"$(BIN)/pip" install -q -c constraints.txt $(PIP_ARGS) inspect-robots
	"$(BIN)/pip" install -q --no-deps -e integrations/inspect_robots_spvla
	"$(BIN)/python" -m pytest -q -m "slow or not slow" tests/test_inspect_robots.py

# Strict: a broken link is an error. Nothing is loaded from the network.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 "$(BIN)/mkdocs" build --strict

lint: $(READY) docs
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy"
	MYPYPATH=integrations/lerobot_policy_spvla "$(BIN)/mypy" -p lerobot_policy_spvla
	MYPYPATH=integrations/inspect_robots_spvla "$(BIN)/mypy" -p inspect_robots_spvla
	"$(BIN)/lint-imports"

clean:
	rm -rf "$(VENV)"

# The fast tests with the newest torch and transformers instead of the constrained ones, in an environment of their own.
LATEST_VENV ?= .venv-latest
test-latest: system
	"$(PYTHON)" -m venv "$(LATEST_VENV)"
	"$(LATEST_VENV)/bin/pip" install -q --upgrade --upgrade-strategy eager $(PIP_ARGS) -e ".[train,eval,libero,onnx,serve,dev]"
	"$(LATEST_VENV)/bin/python" -m pytest -v -n $(WORKERS) --dist worksteal

# The fast tests under another Python: make test-py PYTHON=python3.13
test-py: PY = $(notdir $(PYTHON))
test-py: system
	"$(PYTHON)" -m venv ".venv-$(PY)"
	".venv-$(PY)/bin/pip" install -q -c constraints.txt $(PIP_ARGS) -e ".[train,eval,libero,onnx,serve,dev]"
	".venv-$(PY)/bin/python" -m pytest -v -n $(WORKERS) --dist worksteal

.PHONY: test-latest test-py
