# make install   .venv with everything that training, chat and the tests need
# make demo      train one linear layer of the shapes world on this machine and ask the result
# make lint      ruff: findings and format
# make types     mypy
# make test      the tests
# make test-slow those that take long and differ from others in little
# make shapes    rebuild the small models shipped with the package
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: install demo lint types test test-slow shapes

install: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

demo: install
	$(VENV)/bin/lavis demo

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: install
	$(VENV)/bin/mypy

test-slow: install
	$(VENV)/bin/python -m pytest -q -m slow

test: install
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadscope --no-loadscope-reorder

shapes: install
	$(VENV)/bin/lavis shapes build
