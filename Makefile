# Targets need only python3 (3.11 or newer), make, a compiler and git; they create .venv.
PYTHON ?= python3
SEEDS  ?= 1
DEMO   ?= miniature
EPOCHS ?=
MINUTES ?= 6
WHEELS_PYTHON ?= 3.12
WHEELS_MACHINE ?= x86_64
VENV   ?= .venv
BIN    := $(VENV)/bin
# requirements/$(LOCK).txt is installed into $(VENV): dev, or lowest for the lower bounds of pyproject.toml
LOCK   ?= dev
UPGRADE ?=

.PHONY: demo reproduce post-2023 results docs test programs quick marks pythons lowest faults fuzz lint lock licenses \
	bench dist gpu wheels peers simd clean
.DEFAULT_GOAL := demo
# keep compiled files regardless of the environment: pytest rewrites every assert, in each process
export PYTHONDONTWRITEBYTECODE :=

$(VENV)/.installed: pyproject.toml requirements/$(LOCK).txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: rft needs Python 3.11 or newer; set PYTHON=..." >&2; exit 2; }
	@echo "installing rft and its developer packages into $(VENV): a few minutes" >&2
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q --require-hashes -r requirements/$(LOCK).txt
	$(BIN)/pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	@touch $@

demo: $(VENV)/.installed  ## the paper's experiment in miniature, from images to a report
	$(BIN)/python -m rft.demo --out $(DEMO) --seeds $(SEEDS) $(if $(EPOCHS),--epochs $(EPOCHS))

reproduce: $(VENV)/.installed  ## every row of the paper's tables and Fig. 7, in miniature
	launch/reproduce.sh --miniature --out $(DEMO) --seeds $(SEEDS) \
		$(if $(EPOCHS),--epochs $(EPOCHS)) $(if $(PROCESSES),--processes $(PROCESSES))

post-2023: $(VENV)/.installed  ## the method and later methods on equal terms, in miniature
	launch/reproduce.sh --miniature --suite post-2023 --out $(DEMO) --seeds $(SEEDS) \
		$(if $(EPOCHS),--epochs $(EPOCHS)) $(if $(PROCESSES),--processes $(PROCESSES))

# one process per training: its numbers do not depend on how a batch is split
results: $(VENV)/.installed  ## run the demo on five seeds; update docs/results and the pages that quote it
	$(BIN)/python -m rft.demo --out $(DEMO) --seeds 5 --processes 1
	$(BIN)/python docs/update_results.py --demo $(DEMO)

docs: $(VENV)/.installed  ## build the pages, commands and Python API as an offline site in build/site/html
	$(BIN)/python -m docs.site.build --out build/site

# three processes, because many tests wait for child processes or servers; tests of one file are
# distributed, so that the slowest file does not run alone at the end
test: $(VENV)/.installed  ## all tests except `make programs`, about fourteen minutes on two cores
	$(BIN)/pytest -q -n 3 --dist worksteal -m "not program"

programs: $(VENV)/.installed  ## the tests that run a complete benchmark, demo, installation or cluster walkthrough
	$(BIN)/pytest -q -n 2 --dist worksteal -m program

quick: $(VENV)/.installed  ## tests of at most 0.3 s each, about a minute on two cores
	$(BIN)/pytest -q -n 3 --dist worksteal -m "not slow"

marks: $(VENV)/.installed  ## check that all slower tests are marked `slow`; needs an idle machine
	$(BIN)/pytest -q -m "not slow" --check-slow

pythons:  ## `make quick` on each supported Python that is installed, in build/
	tests/pythons.sh dev 3.11 3.12 3.13

lowest:  ## `make quick` on the exact lower bounds of pyproject.toml, on the oldest and newest Python
	tests/pythons.sh lowest 3.11 3.13

faults: $(VENV)/.installed  ## plant each fault of tools/planted_faults.toml; its tests must fail
	$(BIN)/python tools/plant_faults.py --jobs 2

# ten minutes unless MINUTES is given on the command line
fuzz: MINUTES = 10
fuzz: $(VENV)/.installed  ## mutate valid inputs of every kind for MINUTES; a crash is an error
	$(BIN)/python -m tests.hostile.fuzz --minutes $(MINUTES)

lint: $(VENV)/.installed  ## style, types, module contracts, spelling, shell scripts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/shellcheck -x .ci/run launch/*.sbatch launch/*.sh requirements/*.sh tests/*.sh tests/launch/*.sh

# One resolution, with one release per package for all Pythons if possible: extras.txt has everything
# that users install, and constrains the other files.
# Locked releases stay; `make lock UPGRADE=--upgrade` takes newer ones. A new or reduced lower bound
# needs UPGRADE='--upgrade-package NAME' once.
COMPILE = $(BIN)/uv pip compile -q --no-config --universal --python-version 3.11 --fork-strategy fewest \
	--generate-hashes --no-annotate --custom-compile-command "make lock" $(UPGRADE) pyproject.toml --group build
lock: $(VENV)/.installed  ## write requirements/*.txt for pyproject.toml, with hashes
	$(COMPILE) --extra s3 --extra gcs --extra azure --extra wandb --extra onnx -o requirements/extras.txt
	$(COMPILE) -c requirements/extras.txt -o requirements/run.txt
	$(COMPILE) -c requirements/extras.txt --extra dev -o requirements/dev.txt
	$(COMPILE) --resolution lowest-direct --extra dev --extra gcs --extra azure -o requirements/lowest.txt

licenses: $(VENV)/.installed  ## write requirements/licenses.md, the licence of every locked package
	requirements/licenses.sh $(BIN)

dist: $(VENV)/.installed  ## build the wheel and the sdist in dist/
	$(BIN)/python -m uv build --quiet --no-build-isolation --out-dir dist

bench: $(VENV)/.installed  ## benchmark the step, loader and packer against their peers, checkpoints and faults
	$(BIN)/python -m benchmarks.environments
	$(BIN)/python -m benchmarks.step --processes 3 --save
	$(BIN)/python -m benchmarks.step --compile --save
	$(BIN)/python -m benchmarks.cam_memory --save
	$(BIN)/python -m benchmarks.memory --model ViT-B-32 --save
	$(BIN)/python -m benchmarks.memory --model ViT-B-16 --real --save
	$(BIN)/python -m benchmarks.memory --model ViT-L-14 --real --save
	$(BIN)/python -m benchmarks.cam_share --save
	$(BIN)/python -m benchmarks.method
	$(BIN)/python -m benchmarks.checkpoint --save
	$(BIN)/python -m benchmarks.features --save
	$(BIN)/python -m benchmarks.many_systems --save
	$(BIN)/python -m benchmarks.predict --save
	$(BIN)/python -m benchmarks.faults --save
	$(BIN)/python -m benchmarks.loader --save
	$(BIN)/python -m benchmarks.reader --save
	$(BIN)/python -m benchmarks.feeding --save
	$(BIN)/python -m benchmarks.pack --save
	$(BIN)/python -m benchmarks.simd_difference --save
	$(BIN)/python -m benchmarks.small_sets --save
	$(BIN)/python -m benchmarks.costs --save
	$(BIN)/python -m benchmarks.summary
	$(BIN)/python docs/update_results.py

gpu: $(VENV)/.installed  ## benchmark the step, the trainer and more on this machine's GPU, within MINUTES
	$(BIN)/python -m benchmarks.gpu --minutes $(MINUTES); status=$$?; \
		$(BIN)/python docs/update_results.py && exit $$status

# for a machine with torch and torchvision but no network: docs/gpu.md
wheels: $(VENV)/.installed  ## the other requirements of benchmarks.gpu, as wheels in build/wheels
	$(BIN)/python -m benchmarks.wheels --python $(WHEELS_PYTHON) --machine $(WHEELS_MACHINE)

peers: $(VENV)/.installed  ## run other loaders on the thirteen questions of docs/peers.md
	$(BIN)/python -m benchmarks.environments
	$(BIN)/python -m benchmarks.peers --save
	$(BIN)/python docs/update_results.py

# built before anything is removed, and without pip's cache, which ignores compiler flags
simd: $(VENV)/.installed  ## replace Pillow in .venv by Pillow-SIMD, compiled for AVX2
	rm -rf build/simd-wheel
	CC="cc -mavx2" $(BIN)/pip wheel -q --no-cache-dir --no-binary pillow-simd --no-deps \
		-w build/simd-wheel pillow-simd
	$(BIN)/pip uninstall -q -y pillow pillow-simd
	$(BIN)/pip install -q --no-deps build/simd-wheel/*.whl
	$(BIN)/python -m rft.env

clean:  ## remove everything that these targets created
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis miniature
