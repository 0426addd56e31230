# MedLoop's commands. `make help` lists them.

SHELL := /bin/sh
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SERVICES := trainer evaluator explainer inference dashboard
LOCKS := requirements/torch.txt $(SERVICES:%=requirements/%.txt) requirements/mlflow.txt
PEERS := peers peers-mlserver
LOCAL := shared $(SERVICES:%=services/%)
IMAGES := services/inference infra/mlflow services/evaluator services/dashboard services/explainer services/trainer
UV := $(BIN)/python -m uv
INSTALL := $(UV) pip install --quiet --python $(BIN)/python
WORKFLOW_LINT := .github/actionlint

# What `make demo` is told: DATA=path NAME=name PORTS=auto ARGS="--epochs 3".
DATA ?=
NAME ?=
PORTS ?= fixed
ARGS ?=
# Where the Compose stack's secrets lie.
ENV ?= .env
# TORCH=cpu takes torch's CPU builds from their own index: pinned, without hashes.
TORCH ?=
TORCH_PINS = $$(sed -n 's/^\(torch\(vision\)\{0,1\}==[^ ]*\).*/\1/p' requirements/torch.txt)
TORCH_INTO = $(UV) pip install --quiet --no-deps --python $(1) $(if $(TORCH),--torch-backend $(TORCH) $(TORCH_PINS),--require-hashes -r requirements/torch.txt)
# What images are tagged with.
TAG ?= dev
# COVERAGE=1 has `make test` measure it, for .venv/bin/coverage report.
COVERAGE ?=
# The service that `make alone` installs.
SERVICE ?=

help: ## List these commands.
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/services ## Run the whole loop on this machine and stay up (DATA=path for your own images).
	@$(BIN)/medloop demo $(if $(DATA),--data "$(DATA)") $(if $(NAME),--name "$(NAME)") --ports $(PORTS) $(ARGS)

install: $(VENV)/everything ## Make .venv with everything; starts nothing.

check: $(VENV)/everything ## Formatting, lint, types, import rules, locks.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python requirements/lock.py --check
	$(MAKE) lint-workflows
	$(MAKE) lint-aws
	$(MAKE) lint-images
	$(MAKE) k8s-check

lint-workflows: $(VENV)/everything $(VENV)-actionlint/installed ## Look over .github with zizmor and actionlint.
	$(BIN)/zizmor --offline --no-progress --quiet --strict-collection .github
	node $(WORKFLOW_LINT)/lint.mjs $(VENV)-actionlint .github/workflows/*.yml

lint-images: $(VENV)/everything ## Look over the Dockerfiles with hadolint.
	$(BIN)/hadolint $(IMAGES:%=%/Dockerfile)

k8s-check: $(VENV)/everything $(VENV)-checkov/installed ## Render and look over the Kubernetes manifests; needs kubectl, and no cluster.
	rm -rf $(VENV)-checkov/rendered
	$(BIN)/python -m k8s.check --out $(VENV)-checkov/rendered
	$(VENV)-checkov/bin/checkov --config-file k8s/checkov.yaml \
	  --file $(VENV)-checkov/rendered/overlays-eks.yaml $(VENV)-checkov/rendered/all-components-on-dev.yaml

images: $(addprefix image-,$(notdir $(IMAGES))) ## Build the six images (TAG=dev; TORCH=cuda for GPUs; ARGS for docker build).

image-%:
	docker build --file $(filter %/$*,$(IMAGES))/Dockerfile --tag medloop-$*:$(TAG) $(if $(TORCH),--build-arg TORCH=$(TORCH)) \
	  --build-arg VERSION=$(TAG) --build-arg REVISION=$$(git rev-parse HEAD) $(ARGS) .

lint-aws: $(VENV)/everything ## Look over infra/aws with cfn-lint.
	$(BIN)/cfn-lint infra/aws/*.yaml

test: $(VENV)/everything $(VENV)/browser ## The whole test suite (ARGS for pytest).
	$(BIN)/python $(if $(COVERAGE),-m coverage run) -m pytest $(ARGS)

alone: $(VENV)/bootstrap ## Install one service from its own lock and nothing else, and start it (SERVICE=inference).
	@case " $(SERVICES) " in *" $(SERVICE) "*) ;; *) echo "Which one? make alone SERVICE=..., one of: $(SERVICES)" >&2; exit 2 ;; esac
	$(UV) venv --quiet --clear --python $(BIN)/python $(VENV)-alone
	$(if $(filter $(SERVICE),trainer explainer),$(call TORCH_INTO,$(VENV)-alone/bin/python))
	$(UV) pip install --quiet --python $(VENV)-alone/bin/python --require-hashes --no-deps -r requirements/$(SERVICE).txt
	$(UV) pip install --quiet --python $(VENV)-alone/bin/python --no-deps --build-constraints requirements/build.txt ./shared ./services/$(SERVICE)
	$(VENV)-alone/bin/python .github/scripts/starts.py $(SERVICE)

format: $(VENV)/everything ## Format the code and mend what lint can mend.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(VENV)/bootstrap ## Write the locked requirement files anew from the pyproject files.
	$(BIN)/python requirements/lock.py

bench: $(VENV)/everything ## Run the demo's benchmark.
	$(BIN)/python -m benchmarks.demo

bench-serving: $(VENV)/everything ## Compare inference with those other servers that are installed.
	$(BIN)/python -m benchmarks.serving $(ARGS)

bench-peers: $(PEERS:%=.venv-%/installed) ## Install the other servers, and compare inference with all of them.
	$(MAKE) bench-serving

bench-training: $(VENV)/everything ## Scores on public sets, cost of input, tracking and memory.
	$(BIN)/python -m benchmarks.training $(ARGS)

bench-scaling: $(VENV)/everything ## Pods, nodes and cost of a rate of predictions, and bursts, simulated.
	$(BIN)/python -m benchmarks.scaling $(ARGS)

up: ## Start the Compose stack; makes .env with random secrets where there is none.
	@sh infra/compose/env.sh "$(ENV)"
	docker compose --env-file "$(ENV)" up --detach --wait --build

down: ## Stop the Compose stack; its volumes stay.
	docker compose --env-file "$(ENV)" down

logs: ## Follow the Compose stack's logs (ARGS=inference for one service).
	docker compose --env-file "$(ENV)" logs --follow --tail 100 $(ARGS)

compose-test: $(VENV)/everything ## Drive the Compose stack through the loop, kills and restarts (ARGS=--lab for stand-ins).
	$(BIN)/python -m tests.deploy.compose $(ARGS)

clean: ## Remove .venv, the tools' and peers' environments and what tools left behind; .medloop stays.
	rm -rf $(VENV) $(VENV)-checkov $(VENV)-actionlint $(VENV)-alone $(PEERS:%=.venv-%) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

$(VENV)/bootstrap: requirements/uv.txt
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or newer is needed and '$(PYTHON)' was not found: install it, or name it with PYTHON=path." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; '$(PYTHON)' is older: name another with PYTHON=path." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "The environment could not be made: Debian's Python needs the package python3-venv." >&2; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
	@touch $@

$(VENV)/torch: $(VENV)/bootstrap requirements/torch.txt
	$(call TORCH_INTO,$(BIN)/python)
	@touch $@

$(VENV)/services: $(VENV)/torch $(LOCKS) $(LOCAL:%=%/pyproject.toml)
	$(INSTALL) --require-hashes --no-deps $(patsubst %,-r %,$(filter-out requirements/torch.txt,$(LOCKS)))
	$(INSTALL) --require-hashes --no-deps -r requirements/build.txt
	$(INSTALL) --no-deps --no-build-isolation $(LOCAL:%=-e ./%)
	@touch $@

$(VENV)/everything: $(VENV)/services requirements/dev.txt
	$(INSTALL) --require-hashes --no-deps -r requirements/dev.txt
	@touch $@

$(VENV)-checkov/installed: $(VENV)/bootstrap requirements/checkov.txt
	$(UV) venv --quiet --clear --python $(BIN)/python $(VENV)-checkov
	$(UV) pip install --quiet --python $(VENV)-checkov/bin/python --require-hashes --no-deps -r requirements/checkov.txt
	@touch $@

$(VENV)-actionlint/installed: $(WORKFLOW_LINT)/package.json $(WORKFLOW_LINT)/package-lock.json $(WORKFLOW_LINT)/.npmrc
	@command -v npm >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq npm; } || { echo "Node 18 or newer with npm is needed to look over the workflows: install it (Debian: nodejs npm)." >&2; exit 2; }
	mkdir -p $(@D) && cp $^ $(@D) && cd $(@D) && npm ci --loglevel error
	@touch $@

# The peers' own environments: what one of them needs would hold back another, or us.
.venv-%/installed: $(VENV)/bootstrap requirements/torch.txt requirements/%.txt
	$(UV) venv --quiet --clear --python $(BIN)/python .venv-$*
	$(call TORCH_INTO,.venv-$*/bin/python)
	$(UV) pip install --quiet --python .venv-$*/bin/python --require-hashes --no-deps -r requirements/$*.txt
	@touch $@

# Debian's browser where we may install it, Playwright's own elsewhere.
$(VENV)/browser: $(VENV)/everything
	@if command -v chromium >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -qq && apt-get install -y -qq chromium fonts-dejavu-core; \
	else $(BIN)/python -m playwright install chromium; fi
	@touch $@

.PHONY: help demo install check lint-workflows lint-aws lint-images k8s-check images test alone format lock bench bench-serving bench-peers bench-training bench-scaling up down logs compose-test clean
