PYTHON ?= python3
PY = .venv/bin/python
# Files of tests run side by side: a test computes on one thread.
JOBS ?= 2
PYTEST = $(PY) -m pytest -n $(JOBS) --dist loadfile --durations=30

.PHONY: install test test-fast test-slow test-bits check quickstart quickstart_sd mini mini_video lint docs clean

install: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: install it, or run make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --progress-bar on --constraint constraints.txt --editable ".[dev]"
	touch $@

# One test for each promise of the engine: about 10 minutes on CI.
test: check
	$(PYTEST) -m "not slow"

# Nothing that starts a process or a server, trains or computes for seconds: under 2 minutes.
test-fast: install
	$(PYTEST) -m "not integration and not slow"

# Every script on every number of processes, long runs, and equal bits on other CPUs: about 50 minutes on CI.
test-slow: install
	$(PYTEST) -m slow
	$(MAKE) test-bits

# What asks for equal bits, by the instructions of older CPUs, on two threads and on one.
test-bits: install
	ATEN_CPU_CAPABILITY=default TEST_THREADS=2 $(PYTEST) -m "bits and not slow"
	ATEN_CPU_CAPABILITY=avx2 TEST_THREADS=1 $(PYTEST) -m "bits and not slow"

check: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/lint-imports

# From nothing to a grid of pictures: a demo data set, a small Stage C trained on it, samples for a prompt file.
quickstart: demo/ready
	$(PY) train/train_c.py configs/training/quickstart_c.yaml
	$(PY) inference/text_to_image.py configs/inference/quickstart.yaml

# The same with a mini Stable Diffusion, on latents that are cached first.
quickstart_sd: demo/ready
	rm -rf demo/sd_cache runs/quickstart_sd
	$(PY) tools/cache.py train/train_sd.py configs/training/quickstart_sd.yaml demo/sd_cache
	$(PY) train/train_sd.py configs/training/quickstart_sd.yaml webdataset_path=demo/sd_cache

# The demo set is recreated when what makes it changed; runs on the old one would refuse the new one.
demo/ready: tools/demo_scenes.py tools/make_demo_dataset.py tools/make_demo_subject.py tools/build_dataset.py | install
	rm -rf demo runs/quickstart_* runs/mini_*
	$(PY) tools/make_demo_dataset.py demo/pictures
	$(PY) tools/build_dataset.py demo/pictures demo/shards
	$(PY) tools/make_demo_subject.py demo/subject
	$(PY) tools/build_dataset.py demo/subject demo/subject_shards
	touch $@

# The moving demo set: clips, in shards.
demo/videos_ready: tools/demo_scenes.py tools/demo_clips.py tools/make_demo_dataset.py tools/make_demo_subject.py \
		tools/build_dataset.py | install
	rm -rf demo/videos demo/video_shards demo/subject_clips demo/subject_clip_shards
	$(PY) tools/make_demo_dataset.py --video demo/videos
	$(PY) tools/build_dataset.py demo/videos demo/video_shards
	$(PY) tools/make_demo_subject.py --video demo/subject_clips
	$(PY) tools/build_dataset.py demo/subject_clips demo/subject_clip_shards
	touch $@

# The whole mini cascade from scratch, in about 30 minutes on two cores: towers, Stage A, encoder and previewer, Stage B, the autoencoder
# of the mini Stable Diffusion (the weights of these become those in models/mini), and Stage C. `make mini_video` trains that of clips.
mini: demo/ready
	rm -rf runs/mini_towers runs/mini_t5 runs/mini_a runs/mini_encoder runs/mini_b runs/mini_vae runs/quickstart_c
	$(PY) train/train_towers.py configs/training/mini_towers.yaml
	$(PY) train/train_towers.py configs/training/mini_t5.yaml
	$(PY) train/train_a.py configs/training/mini_a.yaml
	$(PY) train/train_encoder.py configs/training/mini_encoder.yaml
	$(call publish,mini_towers/text_tower,text_tower)
	$(call publish,mini_towers/image_tower,image_tower)
	$(call publish,mini_t5/text_tower,t5)
	$(call publish,mini_a/stage_a,stage_a)
	$(call publish,mini_encoder/effnet_encoder,effnet_encoder)
	$(call publish,mini_encoder/previewer,previewer)
	$(PY) train/train_b.py configs/training/mini_b.yaml
	$(call publish,mini_b/generator_ema,stage_b)
	$(PY) train/train_vae.py configs/training/mini_vae.yaml
	$(call publish,mini_vae/autoencoder_ema,autoencoder)
	$(MAKE) quickstart

# The autoencoder of clips, in about 30 minutes.
mini_video: demo/videos_ready
	rm -rf runs/mini_video_vae
	$(PY) train/train_video_vae.py configs/training/mini_video_vae.yaml
	$(call publish,mini_video_vae/autoencoder_ema,video_autoencoder)

publish = $(PY) tools/convert_weights.py runs/$(1).safetensors models/mini/$(2).safetensors --dtype float16 --overwrite

lint: install
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

# The tables of keys in docs/configuration.md, from the config classes.
docs: install
	$(PY) tools/config_reference.py docs/configuration.md

clean:
	rm -rf demo runs
