# make demo       a story from the built-in model (installs into .venv first)
# make install    the package in .venv
# make test       the test suite, 4.5 minutes on two cores
# make proof      the tests that take longer
# make soak       the longest tests, after a change of what they cover (see CONTRIBUTING.md)
# make clients    the clients that proof and soak ask the server with, in .venv-clients
# make llama-cpp  the llama.cpp that proof and soak run GGUF files with, in .venv-llama-cpp
# make transformers  an early transformers 5 that proof opens folders of --to hf with
# make check      style, types and layers
# make docs       the pages of docs/ as a site, in site/
# make release    wheel and sdist in dist/, checked
# make clean      remove the outputs of builds and tests (.venv is kept)
#
# Variables: PYTHON     the Python to use; default: the first suitable one below
#            TORCH      the torch package for the tests. On Linux it includes CUDA
#                       (gigabytes), unless pip is configured for PyTorch's CPU builds.
#                       TORCH= installs none; the tests that need it are skipped.
#            MLX        MLX=cuda installs MLX for an NVIDIA GPU instead of the CPU (Linux)
#            WORKERS    processes that the tests run in
#            DEMO_SEED  seed of the demo's story
#
# Works with GNU make 3.81, which macOS has.

TORCH ?= torch==2.13.0
WORKERS ?= 2
DEMO_SEED ?= 58
DEMO_PROMPT ?= Once upon a time there was a king who

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed$(MLX:%=-%)
DEVELOP := $(VENV)/.develop$(if $(TORCH),,-without-torch)
DOCS := $(VENV)/.docs
CLIENTS := .venv-clients
TRANSFORMERS := .venv-transformers
LLAMA_CPP := .venv-llama-cpp
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 20

.PHONY: demo install test proof soak clients llama-cpp transformers check docs release clean which-python
.DEFAULT_GOAL := demo

demo: $(INSTALLED)
	@printf '%s' "$(DEMO_PROMPT)"
	@$(BIN)/mlx-openelm generate --prompt "$(DEMO_PROMPT)" --seed $(DEMO_SEED) --quiet
	@echo

install: $(INSTALLED)

test: $(DEVELOP)
	$(PYTEST) -m "not proof and not soak"

proof: $(DEVELOP) $(CLIENTS)/.installed $(LLAMA_CPP)/.installed $(TRANSFORMERS)/.installed
	$(PYTEST) -m "proof and not soak"

soak: $(DEVELOP) $(CLIENTS)/.installed $(LLAMA_CPP)/.installed
	$(PYTEST) -m soak

clients: $(CLIENTS)/.installed

llama-cpp: $(LLAMA_CPP)/.installed

transformers: $(TRANSFORMERS)/.installed

check: $(DEVELOP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: $(DOCS)
	$(BIN)/zensical build --strict

release: $(DEVELOP)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m pytest -m proof tests/promises/test_packaging.py

clean:
	rm -rf build dist site .cache *.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name ".venv*" -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# Installing ------------------------------------------------------------------------

$(INSTALLED): $(BIN)/python pyproject.toml
	@echo "Installing mlx-openelm into $(VENV); the first time takes a few minutes." >&2
	@$(PIP_INSTALL) -e .
	@rm -f $(VENV)/.installed*
	@$(INSTALL_MLX_$(MLX))
	@touch $@

# Both builds of MLX install the same library file: uninstall the other one first.
INSTALL_MLX_ := :
INSTALL_MLX_cuda := $(BIN)/python -m pip uninstall -qq -y mlx-cpu && $(PIP_INSTALL) mlx-cuda-13

$(DEVELOP): $(BIN)/python pyproject.toml
	@echo "Installing mlx-openelm and the tools into $(VENV)." >&2
	@$(PIP_INSTALL) --upgrade "pip>=25.1"
	@$(PIP_INSTALL) $(if $(TORCH),"$(TORCH)" -e ".[torch]" --group with-torch,-e .) --group dev
	@touch $(INSTALLED) $@

# Programs of others, with dependencies that the package does not need: the environment
# .venv-NAME has the dependency group NAME.
$(CLIENTS)/.installed $(LLAMA_CPP)/.installed: .venv-%/.installed: $(BIN)/python pyproject.toml
	@echo "Installing $* into .venv-$*." >&2
	@$(BIN)/python -m venv --clear .venv-$*
	@.venv-$*/bin/python -m pip install -qq --disable-pip-version-check --upgrade "pip>=25.1"
	@.venv-$*/bin/python -m pip install -qq --disable-pip-version-check --group $*
	@touch $@

# The rest, such as torch, is that of .venv, which a .pth file adds to the path. pip warns
# that mlx-lm, which is not imported there, needs a newer one.
$(TRANSFORMERS)/.installed: $(DEVELOP)
	@echo "Installing an early transformers 5 into $(TRANSFORMERS)." >&2
	@$(BIN)/python -m venv --clear $(TRANSFORMERS)
	@$(TRANSFORMERS)/bin/python -m pip install -qq --disable-pip-version-check --upgrade "pip>=25.1"
	@site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	$(BIN)/python -c "$$site" > "$$($(TRANSFORMERS)/bin/python -c "$$site")/venv.pth"
	@$(TRANSFORMERS)/bin/python -m pip install -qq --disable-pip-version-check --group transformers
	@touch $@

$(DOCS): $(BIN)/python pyproject.toml
	@$(PIP_INSTALL) --upgrade "pip>=25.1"
	@$(PIP_INSTALL) --group docs
	@touch $@

# A link to a removed Python counts as missing: create the environment again.
$(BIN)/python:
	@python=`sh -c "$$FIND_PYTHON"` || exit 1; \
	rm -f $(BIN)/python* $(VENV)/.installed $(VENV)/.develop* $(DOCS); \
	echo "Creating $(VENV) with $$python." >&2; \
	"$$python" -m venv $(VENV)

which-python:
	@sh -c "$$FIND_PYTHON"

# Prints the first suitable Python, or an error with the Pythons found and what to install.
define FIND_PYTHON
if [ "$$(uname -s)" = Darwin ] && [ "$$(sysctl -n hw.optional.arm64 2>/dev/null)" != 1 ]
then
    echo "This Mac has an Intel processor; MLX needs one with Apple silicon." >&2
    exit 1
fi
names="python3.13 python3.12 python3.11 python3"
rejected=
for python in $${PYTHON:-$$names /opt/homebrew/bin/python3}
do
    command -v "$$python" >/dev/null 2>&1 || continue
    if reason=$$("$$python" -c "$$CHECK_PYTHON" 2>/dev/null)
    then
        command -v "$$python"
        exit 0
    fi
    [ -z "$$reason" ] || rejected="$$rejected  $$(command -v "$$python") $$reason
"
done
{
    echo "mlx-openelm needs Python 3.11 or newer; no suitable one was found."
    [ -z "$$rejected" ] || printf 'Found:\n%s' "$$rejected"
    echo "Get one with:"
    case "$$(uname -s)" in
    Darwin)
        echo "  brew install python@3.13        (or the installer from python.org)"
        echo "in a terminal that does not run under Rosetta (\`uname -m\` prints arm64)."
        ;;
    *)
        echo "  apt install python3.11 python3.11-venv        (Debian 12)"
        echo "  apt install python3 python3-venv              (Ubuntu 24.04 or newer)"
        echo "  dnf install python3.12                        (Fedora, RHEL)"
        ;;
    esac
    echo "or name one that you have: make PYTHON=/path/to/python3"
} >&2
exit 1
endef

# Prints why this Python is not supported, or nothing.
define CHECK_PYTHON
import platform, sys
machine = platform.machine()
def refuse(reason):
    sys.stdout.write(reason)
    sys.exit(1)
if sys.version_info < (3, 11):
    refuse("is Python %d.%d" % sys.version_info[:2])
if sys.platform == "darwin" and machine != "arm64":
    refuse("is built for Intel and runs under Rosetta; MLX needs an arm64 Python")
if machine not in ("arm64", "aarch64", "x86_64") or sys.maxsize < 2**32:
    refuse("is for %s; MLX has no build for it" % machine)
try:
    import ensurepip, venv
except ImportError:
    refuse("lacks venv (Debian: apt install python%d.%d-venv)" % sys.version_info[:2])
endef

export FIND_PYTHON CHECK_PYTHON PYTHON
unexport PYTHONDONTWRITEBYTECODE  # else every process compiles every module again
