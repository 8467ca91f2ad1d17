# One virtual environment, made on first use; nothing else is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TALKHEAD := $(BIN)/talkhead
DEMO := build/demo
EXAMPLE := $(DEMO)/speaker.mp4

.PHONY: setup demo test check bench gpu clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# The main job on a synthetic speaker: preprocess, finetune, render.
demo: setup
	mkdir -p $(DEMO)
	$(BIN)/python examples/synthetic_speaker.py $(EXAMPLE) --seconds 20
	$(BIN)/python examples/synthetic_speaker.py --speech-only $(DEMO)/speech.wav --seconds 8
	$(TALKHEAD) preprocess $(EXAMPLE) --id speaker --home $(DEMO)/avatars
	$(TALKHEAD) finetune --id speaker -p lokitalk -p tiny -s train.scale=0.6 --fresh --home $(DEMO)/avatars
	$(TALKHEAD) render --id speaker --audio $(DEMO)/speech.wav -o $(DEMO)/speaker-says.mp4 --home $(DEMO)/avatars

# Two processes of one thread each: small tensors gain nothing from a second one.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What CI runs before the tests.
check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/bench.py

# WORK=FOLDER that holds home/alice, preprocessed elsewhere: training and rendering need no tracker.
gpu: setup
	$(BIN)/python benchmarks/bench.py --device cuda $(if $(WORK),--work $(WORK))

clean:
	rm -rf build $(VENV)
