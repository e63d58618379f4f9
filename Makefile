# Sets the tools up and hands over to the launcher; no logic lives here. `make` alone lists the targets and variables.

HW ?=         ## hardware: a name of conf/hardware, such as cpu or ascend910b
MODEL ?=      ## model: a name of conf/model, such as tiny_llava
STAGE ?=      ## stage: projector, lm, lora or full; evaluate, merge, convert, quantize, infer or serve
PRECISION ?=  ## precision: fp32, fp16, bf16 or pure_bf16
STRATEGY ?=   ## strategy: auto, single, ddp, zero1, zero2 or zero3
DATA ?=       ## data: digits, digits_even, digits_large or files
CLUSTER ?=    ## cluster: a name of conf/cluster, such as local
RUNTIME ?=    ## process or docker, in place of the cluster's own
EXP ?=        ## experiment: a cell of conf/experiment, for bench
RUN ?=        ## a published result, or its cell, for bench-rerun
ARGS ?=       ## anything more: overrides for plan and train, arguments of pytest for test

PYTHON ?= python3.11
PIP_FLAGS ?= -qq

OVERRIDES = $(if $(HW),hardware=$(HW)) $(if $(MODEL),model=$(MODEL)) $(if $(STAGE),stage=$(STAGE)) $(if $(PRECISION),precision=$(PRECISION)) \
  $(if $(STRATEGY),strategy=$(STRATEGY)) $(if $(DATA),data=$(DATA)) $(if $(CLUSTER),cluster=$(CLUSTER)) $(if $(RUNTIME),cluster.runtime=$(RUNTIME)) $(ARGS)

LOCKS := images/locks
CPU := $(LOCKS)/cpu-$(shell uname -m)
# Hashes are asked of every package. Isolation is off so that source distributions are built by the locked setuptools, too.
INSTALL = .venv/bin/python -m pip install $(PIP_FLAGS) --disable-pip-version-check --no-build-isolation --use-pep517
# Only a process on this machine needs the trainer's packages here; a container or another machine brings its own.
TRAINER = $(if $(filter-out process,$(RUNTIME))$(filter-out local,$(CLUSTER)),.venv/.launcher,.venv/.launcher .venv/.trainer)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup plan train bench bench-rerun matrix test test-cluster lint render image image-check

help: ## This list
	@awk -F '##' '/^[a-z-]+:.*##/ {split($$1, t, ":"); printf "  make %-12s%s\n", t[1], $$2} /^[A-Z]+ \?=.*##/ {split($$1, v, " "); vars = vars sprintf("  %-12s%s\n", v[1], $$2)} END {printf "\nVariables, as in `make plan HW=h200`:\n%s", vars}' $(MAKEFILE_LIST)

setup: .venv/.launcher .venv/.trainer .venv/.dev ## Set up everything in .venv

plan: .venv/.launcher ## Print what `make train` with the same variables would do, touching nothing
	@.venv/bin/omnilaunch plan $(OVERRIDES)

train: $(TRAINER) ## Carry the plan out: the tiny model on real digits unless the variables say otherwise
	@.venv/bin/omnilaunch launch $(OVERRIDES)

bench: $(TRAINER) ## Run the pinned cell EXP, its repeats one after the other, and publish median and range in docs/results; without EXP list the cells
	@.venv/bin/omnilaunch bench $(EXP) $(if $(CLUSTER),cluster=$(CLUSTER)) $(if $(RUNTIME),cluster.runtime=$(RUNTIME)) $(ARGS)

bench-rerun: $(TRAINER) ## Run the published result RUN again, from its line alone: reproduced or not
	@.venv/bin/omnilaunch bench-rerun $(if $(RUN),$(RUN),$(error say which: make bench-rerun RUN=RESULT)) $(if $(CLUSTER),cluster=$(CLUSTER)) $(ARGS)

matrix: .venv/.launcher ## Write the table "what ran where" of README.md again from docs/results
	@.venv/bin/omnilaunch bench --matrix

test: setup ## Run the tests that need neither an engine nor a network
	@.venv/bin/python -m pytest -m "not docker and not network and not cluster" $(ARGS)

lint: .venv/.launcher .venv/.dev ## ruff and mypy
	@.venv/bin/ruff check . && .venv/bin/mypy

render: .venv/.launcher ## Write images/rendered/ and docs/images.md again from images/versions.yaml
	@.venv/bin/omnilaunch image render

image: .venv/.launcher ## Build the image that `make train RUNTIME=docker` with the same variables would use
	@.venv/bin/omnilaunch image build $(OVERRIDES)

image-check: setup ## Really build images and run in them, fetch those that cannot run here (needs a Docker engine, debootstrap, root, a network)
	@.venv/bin/python -m pytest -m "(docker or network) and not cluster" $(ARGS)

test-cluster: setup ## Run on hosts with an sshd, an engine and a disk of their own, made for the test (needs a Docker engine, debootstrap, root)
	@.venv/bin/python -m pytest -m cluster $(ARGS)

.venv/.python: $(LOCKS)/build.txt
	@$(PYTHON) -c 'import sys, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "omnilaunch needs CPython 3.11 with venv, which '$(PYTHON)' is not. On Debian: apt-get install python3.11-venv. Elsewhere: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 2; }
	@echo "setting up .venv with $(PYTHON): a few seconds"
	@$(PYTHON) -m venv .venv
	@$(INSTALL) --require-hashes -r $(LOCKS)/build.txt
	@touch $@

.venv/.launcher: .venv/.python $(LOCKS)/launcher.txt pyproject.toml
	@echo "setting up the launcher from $(LOCKS)/launcher.txt: about 20 s"
	@$(INSTALL) --require-hashes -r $(LOCKS)/launcher.txt
	@$(INSTALL) --no-deps -e .
	@touch $@

.venv/.torch: .venv/.python $(CPU).torch.txt
	@echo "setting up torch for the CPU from $(CPU).torch.txt: 190 MB, about 30 s"
	@$(INSTALL) --require-hashes --no-deps -r $(CPU).torch.txt
	@touch $@

.venv/.trainer: .venv/.torch $(CPU).txt
	@echo "setting up the trainer from $(CPU).txt: 180 MB, about 80 s"
	@$(INSTALL) --require-hashes -r $(CPU).txt
	@touch $@

.venv/.dev: .venv/.python $(LOCKS)/dev.txt
	@echo "setting up the tests' tools from $(LOCKS)/dev.txt: about 20 s"
	@$(INSTALL) --require-hashes -r $(LOCKS)/dev.txt
	@touch $@

$(LOCKS)/%.txt:
	@echo "$@ does not exist: no lock for this machine yet. The architectures that have one: $(wildcard $(LOCKS)/cpu-*.txt)"; exit 2
