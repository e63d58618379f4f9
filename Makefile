# Sets up the tools and calls the launcher. `make` without a target lists the targets and variables.

HW ?=         ## hardware: a name of conf/hardware, such as cpu or ascend910b
MODEL ?=      ## model: a name of conf/model, such as tiny_llava
STAGE ?=      ## stage: projector, lm, lora or full; evaluate, merge, convert, quantize, infer or serve
PRECISION ?=  ## precision: fp32, fp16, bf16 or pure_bf16
STRATEGY ?=   ## strategy: auto, single, ddp, zero1, zero2 or zero3
DATA ?=       ## data: digits, digits_even, digits_large or files
CLUSTER ?=    ## cluster: a name of conf/cluster, such as local
EXP ?=        ## experiment: a benchmark of conf/experiment, for bench
RUN ?=        ## a published result, or the name of its benchmark, for bench-rerun
RESUME ?=     ## a run that was stopped, killed or failed, for train: an id or `last`
ARGS ?=       ## extra arguments: overrides for plan and train, arguments of pytest for test

PYTHON ?= python3.11
PIP_FLAGS ?= -qq

# make itself takes any NAME=VALUE: a misspelt or lower-case one would be ignored, and another run started.
VARIABLES := HW MODEL STAGE PRECISION STRATEGY DATA CLUSTER EXP RUN RESUME ARGS PYTHON PIP_FLAGS
TYPED := $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
ifneq ($(filter-out $(VARIABLES),$(TYPED)),)
  $(error no variable is called $(filter-out $(VARIABLES),$(TYPED)); valid are $(VARIABLES), in capitals. A setting of the run goes into ARGS, as in ARGS='run.steps=100')
endif

OVERRIDES = $(if $(HW),hardware=$(HW)) $(if $(MODEL),model=$(MODEL)) $(if $(STAGE),stage=$(STAGE)) $(if $(PRECISION),precision=$(PRECISION)) \
  $(if $(STRATEGY),strategy=$(STRATEGY)) $(if $(DATA),data=$(DATA)) $(if $(CLUSTER),cluster=$(CLUSTER)) $(ARGS)

LOCKS := images/locks
CPU := $(LOCKS)/cpu-$(shell uname -m)
# Every package is checked by its hash. Without isolation source distributions are built by the locked setuptools too.
INSTALL = .venv/bin/python -m pip install $(PIP_FLAGS) --disable-pip-version-check --no-build-isolation --use-pep517
# Only the CPU of this machine needs the trainer's packages here; an accelerator has them in its image, and other machines have their own. A run
# that is resumed has them where it started.
TRAINER = .venv/.launcher $(if $(filter-out cpu,$(HW))$(filter-out local,$(CLUSTER))$(RESUME),,.venv/.trainer)
# The same for a benchmark, by its file in conf/experiment. The id of a published result does not say its hardware.
hardware_of = $(shell sed -n 's/^ *- override \/hardware: *//p' $(wildcard conf/experiment/$(1).yaml) /dev/null)
BENCH = .venv/.launcher $(if $(filter-out local,$(CLUSTER))$(filter-out cpu,$(call hardware_of,$(EXP))),,$(if $(EXP),.venv/.trainer))
RERUN = .venv/.launcher $(if $(filter-out local,$(CLUSTER))$(filter-out cpu,$(call hardware_of,$(RUN))),,.venv/.trainer)

OFFLINE := not docker and not network and not cluster
# Two processes with one thread each: more threads than cores wait for each other.
PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup plan train bench bench-rerun matrix test test-slow test-all test-cluster lint render image image-check

help: ## This list
	@awk -F '##' '/^[a-z-]+:.*##/ {split($$1, t, ":"); printf "  make %-12s%s\n", t[1], $$2} /^[A-Z]+ \?=.*##/ {split($$1, v, " "); vars = vars sprintf("  %-12s%s\n", v[1], $$2)} END {printf "\nVariables, as in `make plan HW=h200`:\n%s", vars}' $(MAKEFILE_LIST)

setup: .venv/.launcher .venv/.trainer .venv/.dev ## Set up everything in .venv

plan: .venv/.launcher ## Print what `make train` with the same variables would do, without starting anything
	@.venv/bin/omnilaunch plan $(OVERRIDES)

train: $(TRAINER) ## Start the run, or continue the run RESUME; without variables, the tiny model on real digits
	@.venv/bin/omnilaunch launch $(if $(RESUME),--resume $(RESUME)) $(OVERRIDES)

bench: $(BENCH) ## Run the repeats of benchmark EXP, and publish median and range in docs/results; without EXP list the benchmarks
	@.venv/bin/omnilaunch bench $(EXP) $(if $(CLUSTER),cluster=$(CLUSTER)) $(ARGS)

bench-rerun: $(RERUN) ## Run the published result RUN again, and say whether it reproduces
	@.venv/bin/omnilaunch bench-rerun $(if $(RUN),$(RUN),$(error name a result: make bench-rerun RUN=RESULT)) $(if $(CLUSTER),cluster=$(CLUSTER)) $(ARGS)

matrix: .venv/.launcher ## Update the table "What ran where" of docs/status.md from docs/results
	@.venv/bin/omnilaunch bench --matrix

test: setup ## Run the tests that need neither an engine nor a network and are not slow: at most 12 minutes on two quiet cores
	@$(PYTEST) -m "not slow and not long and $(OFFLINE)" $(ARGS)

test-slow: setup ## Run the slow tests of these, without those that take minutes each
	@$(PYTEST) -m "slow and not long and $(OFFLINE)" $(ARGS)

test-all: setup ## Run every test that needs neither an engine nor a network: more than an hour
	@$(PYTEST) -m "$(OFFLINE)" $(ARGS)

lint: .venv/.launcher .venv/.dev ## ruff and mypy
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

render: .venv/.launcher ## Update images/rendered/ and docs/images.md from images/versions.yaml
	@.venv/bin/omnilaunch image render

image: .venv/.launcher ## Build the image that `make train` with the same variables would use in a container
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
	@echo "setting up the tools of the tests from $(LOCKS)/dev.txt: about 20 s"
	@$(INSTALL) --require-hashes -r $(LOCKS)/dev.txt
	@touch $@

$(LOCKS)/%.txt:
	@echo "$@ does not exist: there is no lock for this architecture. Existing locks: $(wildcard $(LOCKS)/cpu-*.txt)"; exit 2
